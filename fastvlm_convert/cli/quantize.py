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
from fastvlm_convert.cli.costs import cache_text, costs_table, highest
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.layers import ScoreFacts, ScoreNotRun, layers_table, score_facts, score_text
from fastvlm_convert.cli.options import (
    AdapterOption,
    CalibrationOption,
    CheckpointArgument,
    MaxMemoryOption,
    NoCacheOption,
    ProjectorOption,
    RecipeOption,
    VisionTowerOption,
    cache_used,
    chosen_recipe,
    data_source,
)
from fastvlm_convert.pipeline import QuantizeResult, quantize
from fastvlm_convert.quantization.stages import SHARES
from fastvlm_convert.quantized.layer_report import ComponentReport, LayerReport, component_reports
from fastvlm_convert.stage_costs import StageCost, StageMeter
from fastvlm_convert.targets import DEFAULT_TARGETS
from fastvlm_convert.user_cache import CacheUse

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
        stages: What every stage took.
        cache: What was found in the user's cache, and what was put there, by kind.
        resumed_weights: Weights that an interrupted run had written.
        answers: What the integers do to the answers.
        components: Layers by component, and the total.
        layers: Every layer.
        warnings: What the user should know.
    """

    output: str
    total_bytes: int
    peak_memory_bytes: int
    stages: tuple[StageCost, ...]
    cache: dict[str, CacheUse]
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
    max_memory: MaxMemoryOption = None,
) -> None:
    """Store a checkpoint's weights as integers, once for all exports.

    The result is a checkpoint that every other command takes. If a run is interrupted, the same command
    resumes where it stopped.
    """
    settings = chosen_recipe(recipe, calibration)
    try:
        with cache_used(not no_cache), progress(flags_of(context).is_silent, together=SHARES) as on_stage:
            meter = StageMeter(on_stage)
            result = quantize(
                open_checkpoint(checkpoint, adapter, projector=projector, vision_tower=vision_tower),
                output,
                recipe=settings,
                calibration=data_source(calibration),
                overwrite=overwrite,
                max_memory=max_memory,
                on_progress=meter,
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
    document = QuantizeDocument(
        output=str(result.output),
        total_bytes=size,
        peak_memory_bytes=highest(meter.costs),
        stages=meter.costs,
        cache=dict(result.cache_use),
        resumed_weights=result.num_resumed,
        answers=score_facts(result.score),
        components=component_reports(result.record.layers),
        layers=result.record.layers,
        warnings=result.warnings,
    )
    report(context, "passed", document, lambda: _print(result, document), brief=str(result.output))


def _print(result: QuantizeResult, document: QuantizeDocument) -> None:
    print_warnings(result.warnings)
    if result.num_resumed:
        err.print(f"resumed an interrupted run, which had written {result.num_resumed} weights")
    out.print(layers_table(result.record.layers))
    out.print(f"\n{score_text(result.score)}", soft_wrap=True)
    if found := cache_text(result.cache_use):
        out.print(found, soft_wrap=True)
    out.print(f"files: {size_text(document.total_bytes)}\n", soft_wrap=True)
    out.print(costs_table(document.stages))
    path = shlex.quote(str(result.output))
    targets = " ".join(f"--target {target}" for target in DEFAULT_TARGETS)
    err.print(escape(f"\nexport: fastvlm-convert export {path} {targets} -o BUNDLE"), soft_wrap=True)
