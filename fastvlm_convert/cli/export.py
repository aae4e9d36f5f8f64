"""`fastvlm-convert export`: make a bundle."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fastvlm_convert.bench.worker import peak_memory_bytes
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.checkpoint.quantized_checkpoint import is_quantized
from fastvlm_convert.cli.console import err, out, print_json, print_warnings, progress, size_text
from fastvlm_convert.cli.layers import layers_document, layers_table, score_document, score_text
from fastvlm_convert.cli.options import (
    AdapterOption,
    CalibrationOption,
    CheckpointArgument,
    JsonOption,
    StoredRecipeOption,
    TargetOption,
    VerboseOption,
    chosen_recipe,
    chosen_targets,
    data_source,
)
from fastvlm_convert.pipeline import export


def command(
    checkpoint: CheckpointArgument,
    target: TargetOption,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to make.", show_default=False)
    ],
    recipe: StoredRecipeOption = None,
    adapter: AdapterOption = None,
    calibration: CalibrationOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Convert a checkpoint to a bundle that an app can ship."""
    targets = chosen_targets(target)
    settings = None if recipe is None else chosen_recipe(recipe, calibration)
    with progress(quiet=as_json) as on_stage:
        result = export(
            open_checkpoint(checkpoint, adapter),
            output,
            recipe=settings,
            targets=targets,
            calibration=data_source(calibration),
            overwrite=overwrite,
            on_progress=on_stage,
        )
    files = {name: entry.size for name, entry in result.manifest.files.items()}
    if as_json:
        print_json(
            "export",
            "passed",
            bundle=str(result.bundle),
            files=files,
            total_bytes=sum(files.values()),
            peak_memory_bytes=peak_memory_bytes(),
            answers=score_document(result.score),
            **layers_document(result.layers),
            warnings=list(result.warnings),
        )
        return
    print_warnings(result.warnings)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("file")
    table.add_column("size", justify="right")
    for name, size in files.items():
        table.add_row(escape(name), size_text(size))
    table.add_row("[bold]total[/]", f"[bold]{size_text(sum(files.values()))}[/]")
    out.print(table)
    out.print()
    out.print(layers_table(result.layers))
    out.print(f"\n{score_text(result.score)}")
    out.print(f"peak memory {size_text(peak_memory_bytes())}")
    # The quantizer's share shows against the float checkpoint only.
    reference = "CHECKPOINT" if is_quantized(checkpoint) else shlex.quote(str(checkpoint))
    paths = f"{shlex.quote(str(result.bundle))} --reference {reference}"
    merged = "" if adapter is None else f" --adapter {shlex.quote(str(adapter))}"
    err.print(escape(f"\nverify: fastvlm-convert verify {paths}{merged}"), soft_wrap=True)
    err.print(escape(f"bench:  fastvlm-convert bench {paths}"), soft_wrap=True)
