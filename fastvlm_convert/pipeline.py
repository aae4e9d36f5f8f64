"""The stages in order; the only module that knows them all."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from fastvlm_convert import __version__
from fastvlm_convert.bundle.folder import BUNDLE, QUANTIZED_CHECKPOINT, new_folder
from fastvlm_convert.bundle.license import NO_LICENSE
from fastvlm_convert.bundle.quantized_writer import write_settings, write_weights
from fastvlm_convert.bundle.resumable import resumable_folder
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint, source_hash
from fastvlm_convert.checkpoint.quantized_checkpoint import Quantization
from fastvlm_convert.errors import CheckpointError, MissingDependencyError, RecipeError
from fastvlm_convert.exporters.job import ExportJob
from fastvlm_convert.float16.repairs import at_risk, missing_repairs, needed_repairs, settings_of
from fastvlm_convert.float16.report import MIN_HEADROOM, RangeReport, load_report
from fastvlm_convert.manifest import (
    FILE_NAME,
    Artifact,
    Manifest,
    Source,
    Status,
    Target,
    file_entries,
)
from fastvlm_convert.predict.export_plan import files_beside, predicted_artifacts, prepare
from fastvlm_convert.predict.size_check import check_sizes
from fastvlm_convert.quantization.calibration import Calibration
from fastvlm_convert.quantization.prepared_weights import (
    calibration_for,
    plan_checkpoint,
    prepare_weights,
    resolve,
)
from fastvlm_convert.quantization.score import AnswerScore
from fastvlm_convert.quantized.layer_report import LayerReport, layer_reports
from fastvlm_convert.quantized.sqnr import ErrorMeter
from fastvlm_convert.recipe import Recipe

OnProgress = Callable[[str, float], None]


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
    on_progress: OnProgress = lambda stage, share: None,
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
    protected = [checkpoint_path] if adapter is None else [checkpoint_path, adapter]
    checkpoint = open_checkpoint(checkpoint_path, adapter)
    if checkpoint.quantized is not None:
        raise CheckpointError(
            "the checkpoint is quantized already", where=checkpoint_path, hint="give the float checkpoint"
        )
    if not recipe.quantize:
        raise RecipeError(f"recipe '{recipe.name}' quantizes no layer", hint="give it quantize rules")
    recipe, _, _ = resolve(checkpoint, recipe)
    plans = plan_checkpoint(checkpoint, recipe)
    data = calibration_for(checkpoint, recipe, calibration)
    on_progress("hashes", 0.0)
    source = _source(checkpoint, data)
    on_progress("hashes", 1.0)
    key = hashlib.sha256(Quantization(__version__, source, recipe, ()).to_json().encode()).hexdigest()
    notes: list[str] = []
    with resumable_folder(output, key, overwrite, protected, QUANTIZED_CHECKPOINT, notes.append) as work:
        engine = prepare_weights(checkpoint, recipe, data, on_progress)
        meter = ErrorMeter(engine.floats)
        report = partial(on_progress, "weights")
        num_resumed = write_weights(work, meter.view(engine.weights), recipe, meter, report)
        record = write_settings(work, checkpoint, recipe, source, plans, __version__)
    warnings = [*notes, *_checkpoint_warnings(checkpoint, QUANTIZED_CHECKPOINT.name)]
    return QuantizeResult(output, record, engine.score, num_resumed, tuple(warnings))


def export(
    checkpoint_path: Path,
    recipe: Recipe | None,
    targets: Sequence[Target],
    output: Path,
    *,
    adapter: Path | None = None,
    calibration: Path | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = lambda stage, share: None,
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
    protected = [checkpoint_path] if adapter is None else [checkpoint_path, adapter]
    prepared = prepare(checkpoint_path, recipe, targets, adapter)
    exporters = [_exporter(target) for target in targets]  # a missing library shows before the work begins
    checkpoint, recipe = prepared.checkpoint, prepared.recipe
    data = calibration_for(checkpoint, recipe, calibration)
    notes: list[str] = []
    with new_folder(output, overwrite, protected, notes.append) as folder:
        source = _source(checkpoint, data)
        engine = prepare_weights(checkpoint, recipe, data, on_progress)
        meter = ErrorMeter(engine.floats)
        weights = engine.weights if checkpoint.quantized else meter.view(engine.weights)
        job = ExportJob(
            prepared.config,
            weights,
            recipe,
            prepared.contract,
            source.license,
            folder,
            lambda share: None,
        )
        artifacts: list[Artifact] = []
        for target, write in zip(targets, exporters, strict=True):
            artifacts += write(replace(job, on_progress=partial(on_progress, target)))
        check_sizes(folder, artifacts, predicted_artifacts(prepared, targets))
        for name, content in files_beside(prepared, targets, artifacts).items():
            (folder / name).write_bytes(content)
        on_progress("hashes", 0.0)
        scan = _scan_of(checkpoint, source.sha256)
        judged = recipe if "coreml" in targets else _without_state(recipe)
        manifest = Manifest(
            tool=__version__,
            libraries=_library_versions(targets),
            source=source,
            recipe=recipe,
            artifacts=tuple(artifacts),
            contract=prepared.contract,
            fp16_range=_range_status(scan, judged),
            files=file_entries(folder),
        )
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        on_progress("hashes", 1.0)
    stored = checkpoint.quantized
    layers = layer_reports(prepared.plans, meter.sums) if stored is None else stored.record.layers
    warnings = [*notes, *_warnings(checkpoint, manifest), *_range_warnings(scan, judged)]
    return ExportResult(output, manifest, layers, engine.score, tuple(warnings))


@dataclass(frozen=True)
class _Exporter:
    """What people call a target, and the packages whose versions shape its bytes."""

    name: str
    libraries: tuple[str, ...]


_EXPORTERS: dict[Target, _Exporter] = {
    "onnx": _Exporter("ONNX", ("onnx",)),
    "coreml": _Exporter("Core ML", ("coremltools",)),
}
TARGETS: tuple[Target, ...] = tuple(_EXPORTERS)


def _exporter(target: Target) -> Callable[[ExportJob], list[Artifact]]:
    """A target's exporter, imported late: `plan` needs none, and coremltools takes seconds."""
    try:
        module: Any = import_module(f"fastvlm_convert.exporters.{target}.write")
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, f"the {_EXPORTERS[target].name} target") from error
    write: Callable[[ExportJob], list[Artifact]] = getattr(module, f"export_{target}")
    return write


def _source(checkpoint: Checkpoint, data: Calibration | None) -> Source:
    """Where an output comes from; a quantized checkpoint passes on what it was made of."""
    stored = checkpoint.quantized
    calibration = data.sha256 if data else stored.record.source.calibration if stored else None
    license = NO_LICENSE if checkpoint.license is None else checkpoint.license.name
    return Source(checkpoint.layout, source_hash(checkpoint), license, calibration)


def _scan_of(checkpoint: Checkpoint, source_sha256: str) -> RangeReport | None:
    """The scan of a quantized checkpoint itself, or of the float checkpoint."""
    own = None if checkpoint.quantized is None else load_report(checkpoint.sha256)
    return own or load_report(source_sha256)


def _library_versions(targets: Sequence[Target]) -> dict[str, str]:
    used = {name for target in targets for name in _EXPORTERS[target].libraries}
    return {name: metadata.version(name) for name in sorted({"numpy", "tokenizers", *used})}


def _without_state(recipe: Recipe) -> Recipe:
    """A recipe whose cache is as precise as the arithmetic, which it is in every target but Core ML."""
    return replace(recipe, coreml=replace(recipe.coreml, kv_cache="tensors"))


def _range_status(scan: RangeReport | None, recipe: Recipe) -> Status:
    """What a scan of this very checkpoint, if there was one, says of what the recipe leaves to float16."""
    if scan is None:
        return "not_run"
    return "failed" if at_risk(scan, recipe) else "passed"


def _checkpoint_warnings(checkpoint: Checkpoint, made: str) -> list[str]:
    warnings = [
        f"config.json says {d.key} is {d.config}, the tensors say {d.tensors}; the tensors were followed"
        for d in checkpoint.disagreements
    ]
    if checkpoint.license is None:
        warnings.append(f"the checkpoint has no license file; see that you may pass the {made} on")
    return warnings


def _warnings(checkpoint: Checkpoint, manifest: Manifest) -> list[str]:
    warnings = [*manifest.recipe.notes, *_checkpoint_warnings(checkpoint, BUNDLE.name)]
    if manifest.contract.context_length > checkpoint.config.decoder.max_position_embeddings:
        warnings.append(
            f"the context of {manifest.contract.context_length} tokens is longer than the "
            f"{checkpoint.config.decoder.max_position_embeddings} the model was trained for"
        )
    return warnings


def _range_warnings(scan: RangeReport | None, recipe: Recipe) -> list[str]:
    warnings: list[str] = []
    if scan is None:
        return warnings
    if missing := missing_repairs(scan, recipe):
        warnings.append(
            f"the range scan asks for repairs that recipe '{recipe.name}' lacks: "
            + "; ".join(f"{repair.setting} ({repair.reason})" for repair in missing)
            + f"; `fastvlm-convert scan CHECKPOINT --recipe {recipe.name} -o FILE` writes a recipe with them"
        )
    repaired = replace(recipe, repairs=settings_of(needed_repairs(scan, recipe)))
    if left := at_risk(scan, repaired):
        warnings.append(
            f"the range scan found less than {MIN_HEADROOM:.0f}x headroom to float16's limit at "
            f"{', '.join(op.op for op in left)}; keep them in float32 (float32_ops in the recipe)"
        )
    return warnings
