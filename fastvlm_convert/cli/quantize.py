"""`fastvlm-convert quantize`: make a quantized checkpoint."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fastvlm_convert.amounts import size_text
from fastvlm_convert.bundle.resumable import partial_folder
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import err, out, print_warnings, progress, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.layers import ScoreFacts, ScoreNotRun, layers_table, score_facts, score_text
from fastvlm_convert.cli.options import (
    AdapterOption,
    CalibrationOption,
    CheckpointArgument,
    NoCacheOption,
    ProjectorOption,
    RecipeOption,
    VisionTowerOption,
    cache_used,
    chosen_recipe,
    data_source,
)
from fastvlm_convert.peak_memory import peak_memory_bytes
from fastvlm_convert.pipeline import QuantizeResult, quantize
from fastvlm_convert.quantized.layer_report import ComponentReport, LayerReport, component_reports
from fastvlm_convert.targets import DEFAULT_TARGETS

EXAMPLES = """
fastvlm-convert quantize FastVLM-0.5B --recipe int4 -o quantized
fastvlm-convert quantize FastVLM-0.5B --recipe int4 --calibration photos -o mine
"""


@dataclass(frozen=True)
class QuantizeDocument(Document, name="quantize"):
    """A quantized checkpoint that was made.

    Attributes:
        output: Its folder.
        total_bytes: Size of its files.
        peak_memory_bytes: The most memory that was used.
        resumed_weights: Weights that an interrupted run had written.
        answers: What the integers do to the answers.
        components: Layers by component, and the total.
        layers: Every layer.
        warnings: What the user should know.
    """

    output: str
    total_bytes: int
    peak_memory_bytes: int
    resumed_weights: int
    answers: ScoreFacts | ScoreNotRun
    components: tuple[ComponentReport, ...]
    layers: tuple[LayerReport, ...]
    warnings: tuple[str, ...]


def command(
    context: typer.Context,
    checkpoint: CheckpointArgument,
    recipe: RecipeOption,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="QUANTIZED", help="Folder to make.", show_default=False)
    ],
    adapter: AdapterOption = None,
    projector: ProjectorOption = None,
    vision_tower: VisionTowerOption = None,
    calibration: CalibrationOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing quantized checkpoint.")
    ] = False,
    no_cache: NoCacheOption = False,
) -> None:
    """Store a checkpoint's weights as integers, once for all exports.

    The result is a checkpoint that every other command takes. If a run is interrupted, the same command
    resumes where it stopped.
    """
    settings = chosen_recipe(recipe, calibration)
    try:
        with cache_used(not no_cache), progress(flags_of(context).is_silent) as on_stage:
            result = quantize(
                open_checkpoint(checkpoint, adapter, projector=projector, vision_tower=vision_tower),
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
                escape(f"interrupted; the same command resumes from {partial}"),
                soft_wrap=True,
            )
        raise
    size = sum(path.stat().st_size for path in result.output.iterdir())
    peak = peak_memory_bytes()
    document = QuantizeDocument(
        output=str(result.output),
        total_bytes=size,
        peak_memory_bytes=peak,
        resumed_weights=result.num_resumed,
        answers=score_facts(result.score),
        components=component_reports(result.record.layers),
        layers=result.record.layers,
        warnings=result.warnings,
    )
    report(context, "passed", document, lambda: _print(result, size, peak), brief=str(result.output))


def _print(result: QuantizeResult, size: int, peak: int) -> None:
    print_warnings(result.warnings)
    if result.num_resumed:
        err.print(f"resumed an interrupted run, which had written {result.num_resumed} weights")
    out.print(layers_table(result.record.layers))
    out.print(f"\n{score_text(result.score)}", soft_wrap=True)
    out.print(f"files: {size_text(size)}; peak memory: {size_text(peak)}", soft_wrap=True)
    path = shlex.quote(str(result.output))
    targets = " ".join(f"--target {target}" for target in DEFAULT_TARGETS)
    err.print(escape(f"\nexport: fastvlm-convert export {path} {targets} -o BUNDLE"), soft_wrap=True)
