"""`fastvlm-convert quantize`: make a quantized checkpoint."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fastvlm_convert.bench.worker import peak_memory_bytes
from fastvlm_convert.bundle.resumable import partial_folder
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import err, out, print_json, print_warnings, progress, size_text
from fastvlm_convert.cli.layers import layers_document, layers_table, score_document, score_text
from fastvlm_convert.cli.options import (
    AdapterOption,
    CalibrationOption,
    CheckpointArgument,
    JsonOption,
    RecipeOption,
    VerboseOption,
    chosen_recipe,
    data_source,
)
from fastvlm_convert.pipeline import quantize
from fastvlm_convert.targets import BACKENDS


def command(
    checkpoint: CheckpointArgument,
    recipe: RecipeOption,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="QUANTIZED", help="Folder to make.", show_default=False)
    ],
    adapter: AdapterOption = None,
    calibration: CalibrationOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing quantized checkpoint.")
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make a quantized checkpoint; after an interruption the same command goes on where it was."""
    settings = chosen_recipe(recipe, calibration)
    try:
        with progress(quiet=as_json) as on_stage:
            result = quantize(
                open_checkpoint(checkpoint, adapter),
                output,
                recipe=settings,
                calibration=data_source(calibration),
                overwrite=overwrite,
                on_progress=on_stage,
            )
    except (KeyboardInterrupt, SystemExit):
        partial = partial_folder(output)
        if partial.is_dir():
            err.print(
                escape(f"interrupted; the same command goes on with what is done, which lies in {partial}"),
                soft_wrap=True,
            )
        raise
    size = sum(path.stat().st_size for path in result.output.iterdir())
    if as_json:
        print_json(
            "quantize",
            "passed",
            output=str(result.output),
            total_bytes=size,
            peak_memory_bytes=peak_memory_bytes(),
            resumed_weights=result.num_resumed,
            answers=score_document(result.score),
            **layers_document(result.record.layers),
            warnings=list(result.warnings),
        )
        return
    print_warnings(result.warnings)
    if result.num_resumed:
        err.print(f"went on after an interrupted run, which had written {result.num_resumed} weights")
    out.print(layers_table(result.record.layers))
    out.print(f"\n{score_text(result.score)}")
    out.print(f"files {size_text(size)}, peak memory {size_text(peak_memory_bytes())}", soft_wrap=True)
    path = shlex.quote(str(result.output))
    targets = " ".join(f"--target {target}" for target in BACKENDS)
    err.print(escape(f"\nexport: fastvlm-convert export {path} {targets} -o BUNDLE"), soft_wrap=True)
