"""The stages in order; the only module that knows them all."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastvlm_convert import __version__
from fastvlm_convert.bundle.folder import BUNDLE, QUANTIZED_CHECKPOINT, new_folder
from fastvlm_convert.bundle.quantized_writer import write_settings, write_weights
from fastvlm_convert.bundle.resumable import resumable_folder
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.checkpoint.quantized_checkpoint import Quantization
from fastvlm_convert.errors import CheckpointError, RecipeError
from fastvlm_convert.exporters.backends import backend_of
from fastvlm_convert.exporters.job import ExportJob
from fastvlm_convert.float16.verdict import judge
from fastvlm_convert.manifest import FILE_NAME, Artifact, Manifest, Source, Status, file_entries
from fastvlm_convert.predict.export_plan import (
    ExportPlan,
    context_warnings,
    files_beside,
    plan_export,
    predicted_artifacts,
)
from fastvlm_convert.predict.size_check import check_sizes
from fastvlm_convert.progress import OnStage, ignore_stage
from fastvlm_convert.provenance import library_versions, source_of, source_warnings
from fastvlm_convert.quantization.calibration import Calibration
from fastvlm_convert.quantization.prepared_weights import calibration_for, prepare_weights
from fastvlm_convert.quantization.score import AnswerScore
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.quantized.layer_report import LayerReport, layer_reports
from fastvlm_convert.quantized.sqnr import ErrorMeter
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.targets import Target


@dataclass(frozen=True)
class ExportResult:
    """A finished export.

    Attributes:
        bundle: The folder.
        manifest: What it holds.
        layers: What was done to every matrix and convolution.
        score: What the integers do to the answers; None where no solver ran the model.
        warnings: What the user should know.
    """

    bundle: Path
    manifest: Manifest
    layers: tuple[LayerReport, ...]
    score: AnswerScore | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class QuantizeResult:
    """A finished quantized checkpoint.

    Attributes:
        output: The folder.
        record: What was done.
        score: What the integers do to the answers; None where no solver ran the model.
        num_resumed: Weights that an earlier, interrupted run had finished.
        warnings: What the user should know.
    """

    output: Path
    record: Quantization
    score: AnswerScore | None
    num_resumed: int
    warnings: tuple[str, ...]


def quantize(
    checkpoint_path: Path,
    recipe: Recipe,
    output: Path,
    *,
    adapter: Path | None = None,
    calibration: Path | None = None,
    overwrite: bool = False,
    on_progress: OnStage = ignore_stage,
) -> QuantizeResult:
    """Make a quantized checkpoint, which every command takes like any other.

    Args:
        checkpoint_path: The float checkpoint's folder; it is only read.
        recipe: How to quantize.
        output: Folder to make; it appears whole or not at all. An interrupted run leaves `OUTPUT.partial`,
            with which the same call goes on.
        adapter: PEFT folder that is merged in before, or None.
        calibration: Pictures for solvers that need data, a folder or a .jsonl file; None generates some.
        overwrite: Whether an existing quantized checkpoint may be replaced.
        on_progress: Called with the name of the stage and the share of it that is done, 0..1.

    Raises:
        ConversionError: The input, the recipe or the output does not allow it.
    """
    checkpoint = open_checkpoint(checkpoint_path, adapter)
    if checkpoint.quantized is not None:
        raise CheckpointError(
            "the checkpoint is quantized already", where=checkpoint.path, hint="give the float checkpoint"
        )
    if not recipe.quantize:
        raise RecipeError(f"recipe '{recipe.name}' quantizes no layer", hint="give it quantize rules")
    plan = plan_weights(checkpoint, recipe)
    data = calibration_for(plan, calibration)
    on_progress("hashes", 0.0)
    source = source_of(checkpoint, data)
    on_progress("hashes", 1.0)
    key = hashlib.sha256(Quantization(__version__, source, plan.recipe, ()).to_json().encode()).hexdigest()
    notes: list[str] = []
    inputs = _inputs(checkpoint, calibration)
    with resumable_folder(output, key, overwrite, inputs, QUANTIZED_CHECKPOINT, notes.append) as work:
        made = prepare_weights(plan, data, on_progress)
        meter = ErrorMeter(made.floats)
        report = partial(on_progress, "weights")
        num_resumed = write_weights(work, meter.view(made.weights), plan.recipe, meter, report)
        record = write_settings(work, plan, source, __version__)
    warnings = [*notes, *source_warnings(checkpoint, QUANTIZED_CHECKPOINT.name), *_notes_of(data)]
    return QuantizeResult(output, record, made.score, num_resumed, tuple(warnings))


def export(
    checkpoint_path: Path,
    recipe: Recipe | None,
    targets: Sequence[Target],
    output: Path,
    *,
    adapter: Path | None = None,
    calibration: Path | None = None,
    overwrite: bool = False,
    on_progress: OnStage = ignore_stage,
) -> ExportResult:
    """Convert a checkpoint to a bundle.

    Args:
        checkpoint_path: The checkpoint's folder; it is only read.
        recipe: How to convert; None takes the recipe of a quantized checkpoint.
        targets: Formats to export.
        output: Folder to make; it appears whole or not at all.
        adapter: PEFT folder that is merged in, or None.
        calibration: Pictures for solvers that need data, a folder or a .jsonl file; None generates some.
        overwrite: Whether an existing bundle may be replaced.
        on_progress: Called with the name of the stage and the share of it that is done, 0..1.

    Raises:
        ConversionError: The input, the recipe, the target or the output does not allow it.
    """
    plan = plan_export(open_checkpoint(checkpoint_path, adapter), recipe, targets)
    for target in plan.targets:
        backend_of(target).exporter()  # a missing library shows before the work begins
    checkpoint = plan.checkpoint
    data = calibration_for(plan, calibration)
    notes: list[str] = []
    with new_folder(output, overwrite, _inputs(checkpoint, calibration), notes.append) as folder:
        source = source_of(checkpoint, data)
        verdict = judge(checkpoint, plan.recipe, plan.targets)
        made = prepare_weights(plan, data, on_progress)
        meter = ErrorMeter(made.floats)
        weights = made.weights if checkpoint.quantized else meter.view(made.weights)
        artifacts = _write_artifacts(plan, weights, source.license, folder, on_progress)
        on_progress("hashes", 0.0)
        manifest = _manifest(plan, source, artifacts, verdict.status, folder)
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        on_progress("hashes", 1.0)
    stored = checkpoint.quantized
    layers = layer_reports(plan.layers, meter.sums) if stored is None else stored.record.layers
    warnings = [
        *notes,
        *plan.recipe.notes,
        *_notes_of(data),
        *source_warnings(checkpoint, BUNDLE.name),
        *context_warnings(plan),
        *verdict.warnings,
    ]
    return ExportResult(output, manifest, layers, made.score, tuple(warnings))


def _inputs(checkpoint: Checkpoint, calibration: Path | None) -> tuple[Path, ...]:
    """Folders and files that are read, and so must not be replaced."""
    return checkpoint.folders if calibration is None else (*checkpoint.folders, calibration)


def _notes_of(data: Calibration | None) -> tuple[str, ...]:
    return () if data is None else data.notes


def _write_artifacts(
    plan: ExportPlan, weights: MixedSource, license: str, folder: Path, on_progress: OnStage
) -> list[Artifact]:
    """Write what every target's runtime loads, as large as planned, and what clients read beside it."""
    artifacts: list[Artifact] = []
    for target in plan.targets:
        progress = partial(on_progress, target)
        job = ExportJob(plan.config, weights, plan.recipe, plan.contract, license, folder, progress)
        artifacts += backend_of(target).exporter()(job)
    check_sizes(folder, artifacts, predicted_artifacts(plan).sizes)
    for name, content in files_beside(plan, artifacts).items():
        (folder / name).write_bytes(content)
    return artifacts


def _manifest(
    plan: ExportPlan, source: Source, artifacts: Sequence[Artifact], fp16_range: Status, folder: Path
) -> Manifest:
    """The manifest of a folder that is complete but for it."""
    return Manifest(
        tool=__version__,
        libraries=library_versions(plan.targets),
        source=source,
        recipe=plan.recipe,
        artifacts=tuple(artifacts),
        contract=plan.contract,
        fp16_range=fp16_range,
        files=file_entries(folder),
    )
