"""`fastvlm-convert export`: make a bundle."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fastvlm_convert.activation_report import ActivationReport
from fastvlm_convert.amounts import size_text
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.checkpoint.quantized_checkpoint import is_quantized
from fastvlm_convert.cli.console import err, out, plain_table, print_warnings, progress, report
from fastvlm_convert.cli.costs import cache_text, costs_table, highest
from fastvlm_convert.cli.document import EXIT_CODES, Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.layers import (
    ScoreFacts,
    ScoreNotRun,
    activations_text,
    layers_table,
    score_facts,
    score_text,
)
from fastvlm_convert.cli.options import (
    AdapterOption,
    CalibrationOption,
    CheckpointArgument,
    MaxMemoryOption,
    NoCacheOption,
    ProjectorOption,
    StoredRecipeOption,
    TargetOption,
    VisionTowerOption,
    cache_used,
    chosen_recipe,
    chosen_targets,
    data_source,
)
from fastvlm_convert.manifest import Status
from fastvlm_convert.outcomes import Outcome
from fastvlm_convert.pipeline import ExportResult, export
from fastvlm_convert.quantization.stages import SHARES
from fastvlm_convert.quantized.layer_report import ComponentReport, LayerReport, component_reports
from fastvlm_convert.stage_costs import StageCost, StageMeter
from fastvlm_convert.user_cache import CacheUse

EXAMPLES = """
fastvlm-convert export FastVLM-0.5B --target coreml --recipe ios-int4 -o app
fastvlm-convert export quantized --target onnx --target coreml -o both
"""


@dataclass(frozen=True)
class ExportDocument(Document, name="export", statuses=("passed", "failed")):
    """A bundle that was made.

    Attributes:
        bundle: Its folder.
        files: Bytes of every file that its manifest lists.
        total_bytes: Of all of them.
        peak_memory_bytes: The most memory that was used.
        stages: What every stage took.
        cache: What was found in the user's cache, and what was put there, by kind.
        answers: What the integers do to the answers.
        activations: What was done to the encoder's activations; null where they are floats.
        components: Layers by component, and the total.
        layers: Every layer.
        warnings: What the user should know.
        findings: What `lint` says of it.
    """

    bundle: str
    files: dict[str, int]
    total_bytes: int
    peak_memory_bytes: int
    stages: tuple[StageCost, ...]
    cache: dict[str, CacheUse]
    answers: ScoreFacts | ScoreNotRun
    activations: ActivationReport | None
    components: tuple[ComponentReport, ...]
    layers: tuple[LayerReport, ...]
    warnings: tuple[str, ...]
    findings: tuple[Outcome, ...]


def command(
    context: typer.Context,
    checkpoint: CheckpointArgument,
    target: TargetOption,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to make.", show_default=False)
    ],
    recipe: StoredRecipeOption = None,
    adapter: AdapterOption = None,
    projector: ProjectorOption = None,
    vision_tower: VisionTowerOption = None,
    calibration: CalibrationOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    no_cache: NoCacheOption = False,
    max_memory: MaxMemoryOption = None,
) -> None:
    """Convert a checkpoint to a bundle that an app can ship.

    A bundle is a folder: artifacts for each target, tokenizer and config files, and a manifest that describes
    them. It appears whole or not at all. What `lint` finds about it is printed; the exit code is 1 if that is
    an error.
    """
    targets = chosen_targets(target)
    settings = None if recipe is None else chosen_recipe(recipe, calibration)
    with cache_used(not no_cache), progress(flags_of(context).is_silent, together=SHARES) as on_stage:
        meter = StageMeter(on_stage)
        source = open_checkpoint(checkpoint, adapter, projector=projector, vision_tower=vision_tower)
        result = export(
            source,
            output,
            recipe=settings,
            targets=targets,
            calibration=data_source(calibration),
            overwrite=overwrite,
            max_memory=max_memory,
            on_progress=meter,
        )
    document = _document(result, meter.costs)
    status: Status = "failed" if any(f.severity == "error" for f in result.findings) else "passed"

    def show() -> None:
        print_warnings(result.warnings)
        _print_findings(result.findings)
        _print_files(document.files)
        out.print()
        out.print(layers_table(result.layers))
        out.print(f"\n{score_text(result.score)}", soft_wrap=True)
        if result.manifest.activations is not None:
            out.print(activations_text(result.manifest.activations), soft_wrap=True)
        if found := cache_text(result.cache_use):
            out.print(found, soft_wrap=True)
        out.print()
        out.print(costs_table(document.stages))
        parts = {"adapter": adapter, "projector": projector, "vision-tower": vision_tower}
        _print_next_steps(checkpoint, result, parts)

    report(context, status, document, show, brief=str(result.bundle))
    if status == "failed":
        raise typer.Exit(EXIT_CODES[status])


def _document(result: ExportResult, stages: tuple[StageCost, ...]) -> ExportDocument:
    files = {name: entry.size for name, entry in result.manifest.files.items()}
    return ExportDocument(
        bundle=str(result.bundle),
        files=files,
        total_bytes=sum(files.values()),
        peak_memory_bytes=highest(stages),
        stages=stages,
        cache=dict(result.cache_use),
        answers=score_facts(result.score),
        activations=result.manifest.activations,
        components=component_reports(result.layers),
        layers=result.layers,
        warnings=result.warnings,
        findings=tuple(result.findings),
    )


def _print_findings(findings: Sequence[Outcome]) -> None:
    """What breaks a rule; notes are left to `lint`."""
    for finding in findings:
        if finding.severity != "info":
            color = "bold red" if finding.severity == "error" else "yellow"
            place = f" ({finding.where})" if finding.where else ""
            text = f"{finding.message}{place}: fastvlm-convert lint --explain {finding.id}"
            err.print(f"[{color}]{finding.severity}:[/] {escape(text)}", soft_wrap=True)


def _print_files(files: Mapping[str, int]) -> None:
    table = plain_table("file", "size", right=("size",))
    for name, size in files.items():
        table.add_row(escape(name), size_text(size))
    table.add_row("[bold]total[/]", f"[bold]{size_text(sum(files.values()))}[/]")
    out.print(table)


def _print_next_steps(checkpoint: Path, result: ExportResult, parts: Mapping[str, Path | None]) -> None:
    # The quantizer's share shows against the float checkpoint only.
    reference = "CHECKPOINT" if is_quantized(checkpoint) else shlex.quote(str(checkpoint))
    paths = f"{shlex.quote(str(result.bundle))} --reference {reference}"
    given = (f" --{name} {shlex.quote(str(path))}" for name, path in parts.items() if path is not None)
    err.print(escape(f"\nverify: fastvlm-convert verify {paths}{''.join(given)}"), soft_wrap=True)
    err.print(escape(f"bench:  fastvlm-convert bench {paths}"), soft_wrap=True)
