"""The stages in order, as functions for users; the only module that knows them all."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastvlm_convert import __version__
from fastvlm_convert.activation_report import ActivationReport
from fastvlm_convert.bundle.folder import BUNDLE, QUANTIZED_CHECKPOINT, new_folder
from fastvlm_convert.bundle.license import license_text
from fastvlm_convert.bundle.quantized_writer import write_settings, write_weights
from fastvlm_convert.bundle.resumable import resumable_folder
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, opened
from fastvlm_convert.checkpoint.quantized_checkpoint import Quantization
from fastvlm_convert.delivery.stores import STORES, StoreFit, files_for, store_fit
from fastvlm_convert.errors import CheckpointError, RecipeError
from fastvlm_convert.exporters.backends import Prediction, backend_of
from fastvlm_convert.exporters.job import ExportJob
from fastvlm_convert.float16.verdict import judge
from fastvlm_convert.lint.run import lint
from fastvlm_convert.manifest import (
    FILE_NAME,
    Artifact,
    FileEntry,
    Manifest,
    Source,
    Status,
    file_entries,
    file_entry,
)
from fastvlm_convert.outcomes import Outcome
from fastvlm_convert.predict.export_plan import (
    ExportPlan,
    description_of,
    files_beside,
    plan_export,
    predicted_artifacts,
    predicted_bundle,
)
from fastvlm_convert.predict.memory import StageNeed, check_fits, stage_needs
from fastvlm_convert.predict.size_check import check_sizes
from fastvlm_convert.predict.sizes import cache_bytes
from fastvlm_convert.progress import OnStage, ignore_stage
from fastvlm_convert.provenance import library_versions, source_of, source_warnings
from fastvlm_convert.quantization.calibration import Calibration
from fastvlm_convert.quantization.prepared_weights import calibration_for, prepare_weights
from fastvlm_convert.quantization.score import AnswerScore
from fastvlm_convert.quantization.stages import SEARCHED, SOLVED
from fastvlm_convert.quantization.weight_plan import WeightPlan, plan_weights
from fastvlm_convert.quantized.layer_report import LayerReport, layer_reports
from fastvlm_convert.quantized.sqnr import ErrorMeter
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.recipe import Recipe, load_recipe, without_data
from fastvlm_convert.resolved_recipe import ResolvedRecipe
from fastvlm_convert.targets import BACKENDS, DEFAULT_TARGETS, Target, known_target
from fastvlm_convert.user_cache import CacheUse, tallied


@dataclass(frozen=True)
class PlanResult:
    """What an export would do.

    Attributes:
        plan: Checkpoint, resolved recipe, targets, and what happens to every layer (`plan.layers`).
        files: Bytes of every file but the manifest, by its path relative to the bundle.
        stages: The memory that every stage of the export needs, estimated.
        notes: What a target does otherwise than `plan.layers` says.
        stores: Whether the bundle fits what stores deliver beside an app.
    """

    plan: ExportPlan
    files: Mapping[str, int]
    stages: tuple[StageNeed, ...]
    notes: tuple[str, ...]
    stores: tuple[StoreFit, ...]

    @property
    def peak_memory_bytes(self) -> int:
        """What the export needs, estimated."""
        return max(stage.peak_memory_bytes for stage in self.stages)

    @property
    def total_bytes(self) -> int:
        """Bytes of all those files."""
        return sum(self.files.values())

    def kv_cache_bytes(self, target: Target, context_length: int) -> int:
        """Bytes of the KV cache of so many tokens in one of the targets."""
        return cache_bytes(self.plan.config, self.plan.recipe, target, context_length)


@dataclass(frozen=True)
class QuantizeResult:
    """A finished quantized checkpoint.

    Attributes:
        output: The folder.
        record: What was done.
        score: What the integers do to the answers; None where no solver ran the model.
        num_resumed: Weights that an earlier, interrupted run had finished.
        cache_use: What was found in the user's cache and what was put there, by kind.
        warnings: What the user should know.
    """

    output: Path
    record: Quantization
    score: AnswerScore | None
    num_resumed: int
    cache_use: Mapping[str, CacheUse]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class ExportResult:
    """A finished export.

    Attributes:
        bundle: The folder.
        manifest: What it holds.
        layers: What was done to every matrix and convolution.
        score: What the integers do to the answers; None where no solver ran the model.
        cache_use: What was found in the user's cache and what was put there, by kind.
        warnings: What the user should know.
        findings: What breaks a rule of `lint` for a bundle that may run anywhere, errors first.
    """

    bundle: Path
    manifest: Manifest
    layers: tuple[LayerReport, ...]
    score: AnswerScore | None
    cache_use: Mapping[str, CacheUse]
    warnings: tuple[str, ...]
    findings: tuple[Outcome, ...]


def plan(
    checkpoint: str | Path | Checkpoint,
    *,
    recipe: str | Path | Recipe | None = None,
    targets: str | Iterable[str] | None = None,
    max_memory: int | None = None,
) -> PlanResult:
    """See what an export would do; reads config and headers alone.

    Args:
        checkpoint: A checkpoint's folder, or what `open_checkpoint` made of it.
        recipe: How to convert: a shipped recipe's name, a YAML file, or what `load_recipe` made of one. None
            takes the recipe of a quantized checkpoint.
        targets: Formats to export, or one of them; ONNX and Core ML by default.
        max_memory: Bytes of memory that the export may use; None refuses nothing.

    Raises:
        ConversionError: The input, the recipe, a target or the memory does not allow it.
    """
    planned = plan_export(opened(checkpoint), _recipe(recipe), _targets(targets))
    needs = _needs(planned, planned.targets)
    if max_memory is not None:
        check_fits(needs, max_memory)
    predicted = predicted_bundle(planned)
    return PlanResult(planned, predicted.sizes, needs, tuple(predicted.notes), _stores(planned, predicted))


def quantize(
    checkpoint: str | Path | Checkpoint,
    output: str | Path,
    *,
    recipe: str | Path | Recipe,
    calibration: str | Path | None = None,
    overwrite: bool = False,
    max_memory: int | None = None,
    on_progress: OnStage = ignore_stage,
) -> QuantizeResult:
    """Make a quantized checkpoint, which can be used like any other.

    More than six parameters: all that the command has.

    Args:
        checkpoint: A float checkpoint's folder, which is only read, or what `open_checkpoint` made of it.
        output: Folder to make; it appears whole or not at all. An interrupted run leaves `OUTPUT.partial`,
            with which the same call goes on.
        recipe: How to quantize: a shipped recipe's name, a YAML file, or what `load_recipe` made of one.
        calibration: Pictures for solvers that need data, a folder or a .jsonl file; None takes the
            mix of `fastvlm_convert.mix`.
        overwrite: Whether an existing quantized checkpoint may be replaced.
        max_memory: Bytes of memory that it may use; None takes what is free.
        on_progress: Called with the name of the stage and the share of it that is done, 0..1.

    Raises:
        ConversionError: The input, the recipe, the output or the memory does not allow it.
    """
    source, output = opened(checkpoint), Path(output)
    planned = plan_weights(source, _quantizing(recipe, source))
    check_fits(_needs(planned, ()), max_memory)
    data = calibration_for(planned, _path(calibration))
    on_progress("hashes", 0.0)
    origin = source_of(source, data)
    on_progress("hashes", 1.0)
    notes: list[str] = []
    inputs = _inputs(source, calibration)
    key = _key(origin, planned.recipe)
    with (
        tallied() as tally,
        resumable_folder(output, key, overwrite, inputs, QUANTIZED_CHECKPOINT, notes.append) as work,
    ):
        made = prepare_weights(planned, data, on_progress)
        meter = ErrorMeter(made.floats)
        report = partial(on_progress, "weights")
        num_resumed = write_weights(work, meter.view(made.weights), planned.recipe, meter, report)
        record = write_settings(work, planned, origin, __version__)
    warnings = [*notes, *source_warnings(source, QUANTIZED_CHECKPOINT.name), *_notes_of(data)]
    return QuantizeResult(output, record, made.score, num_resumed, tally.counts(), tuple(warnings))


def export(
    checkpoint: str | Path | Checkpoint,
    output: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    targets: str | Iterable[str] | None = None,
    calibration: str | Path | None = None,
    overwrite: bool = False,
    max_memory: int | None = None,
    on_progress: OnStage = ignore_stage,
) -> ExportResult:
    """Convert a checkpoint to a bundle.

    More than six parameters: those of `plan` and of `quantize` together.

    Args:
        checkpoint: A checkpoint's folder, which is only read, or what `open_checkpoint` made of it.
        output: Folder to make; it appears whole or not at all.
        recipe: How to convert: a shipped recipe's name, a YAML file, or what `load_recipe` made of one. None
            takes the recipe of a quantized checkpoint.
        targets: Formats to export, or one of them; ONNX and Core ML by default.
        calibration: Pictures for solvers that need data, as of `quantize`.
        overwrite: Whether an existing bundle may be replaced.
        max_memory: Bytes of memory that it may use; None takes what is free.
        on_progress: Called with the name of the stage and the share of it that is done, 0..1.

    Raises:
        ConversionError: The input, the recipe, a target, the output or the memory does not allow it.
    """
    planned, output = plan_export(opened(checkpoint), _recipe(recipe), _targets(targets)), Path(output)
    check_fits(_needs(planned, planned.targets), max_memory)
    for target in planned.targets:
        backend_of(target).exporter()  # a missing library shows before the work begins
    source = planned.checkpoint
    predicted = predicted_artifacts(planned)
    beside = files_beside(planned, predicted.artifacts)  # which takes memory that weights need later
    data = calibration_for(planned, _path(calibration))
    notes: list[str] = []
    inputs = _inputs(source, calibration)
    with tallied() as tally, new_folder(output, overwrite, inputs, notes.append) as folder:
        on_progress("hashes", 0.0)
        origin = source_of(source, data)
        on_progress("hashes", 1.0)
        made = prepare_weights(planned, data, on_progress)
        meter = ErrorMeter(made.floats)
        weights = made.weights if source.quantized else meter.view(made.weights)
        artifacts = _write_artifacts(planned, weights, beside, folder, on_progress)
        check_sizes(folder, artifacts, predicted.sizes)
        on_progress("bundle", 0.0)
        verdict = judge(source, planned.recipe, planned.targets)
        files = _described(planned, origin, artifacts, folder)
        manifest = _manifest(planned, origin, artifacts, verdict.status, files, made.activations)
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    stored = source.quantized
    layers = layer_reports(planned.layers, meter.sums) if stored is None else stored.record.layers
    odd = source_warnings(source, BUNDLE.name)
    warnings = (*notes, *planned.recipe.notes, *predicted.notes, *_notes_of(data), *odd, *verdict.warnings)
    findings = lint(output).findings
    on_progress("bundle", 1.0)
    return ExportResult(output, manifest, layers, made.score, tally.counts(), warnings, findings)


def _needs(planned: WeightPlan, targets: Sequence[Target]) -> tuple[StageNeed, ...]:
    """Memory that the stages need; without targets of a quantized checkpoint's making."""
    checkpoint = planned.checkpoint
    recipe = planned.recipe if planned.is_calibrated else without_data(planned.recipe)
    is_stored = checkpoint.quantized is not None
    num_tokens = checkpoint.tokenizer.num_tokens
    return stage_needs(planned.config, planned.layers, recipe, targets, num_tokens, is_stored=is_stored)


def _stores(planned: ExportPlan, predicted: Prediction) -> tuple[StoreFit, ...]:
    """Whether the bundle will fit the stores whose devices run its targets."""
    fits = []
    for store in STORES.values():
        if set(store.targets) & set(planned.targets):
            files = files_for(store, predicted.sizes, predicted.artifacts)
            fits.append(store_fit(store, files, predicted.artifacts))
    return tuple(fits)


def _recipe(recipe: str | Path | Recipe | None) -> Recipe | None:
    return recipe if recipe is None or isinstance(recipe, Recipe) else load_recipe(recipe)


def _quantizing(recipe: str | Path | Recipe, checkpoint: Checkpoint) -> Recipe:
    """A recipe for a checkpoint that is to be quantized, and can be."""
    if checkpoint.quantized is not None:
        raise CheckpointError(
            "the checkpoint is quantized already", where=checkpoint.path, hint="give the float checkpoint"
        )
    settings = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if settings.vision.activations != "float":
        raise RecipeError(
            f"vision.activations is {settings.vision.activations}, and a quantized checkpoint holds weights "
            "alone",
            hint="export the float checkpoint, or set vision.activations to float",
        )
    if not settings.quantize:
        raise RecipeError(f"recipe '{settings.name}' quantizes no layer", hint="give it quantize rules")
    return settings


def _targets(targets: str | Iterable[str] | None) -> list[Target]:
    """Each once."""
    named = DEFAULT_TARGETS if targets is None else [targets] if isinstance(targets, str) else targets
    return [known_target(name) for name in dict.fromkeys(named)]


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _key(source: Source, recipe: ResolvedRecipe) -> str:
    """What the weights of a quantized checkpoint depend on; the rest is written when they are complete."""
    parts = recipe.to_dict()
    for part in ("name", "description", "notes", "gates", *BACKENDS):
        parts.pop(part, None)  # not every target has settings of its own
    versions = (__version__, SEARCHED.version, SOLVED.version)
    return hashlib.sha256(repr((versions, source, parts)).encode()).hexdigest()


def _inputs(checkpoint: Checkpoint, calibration: str | Path | None) -> tuple[Path, ...]:
    """Folders and files that are read, and so must not be replaced."""
    return checkpoint.folders if calibration is None else (*checkpoint.folders, Path(calibration))


def _notes_of(data: Calibration | None) -> tuple[str, ...]:
    return () if data is None else data.notes


def _write_artifacts(
    planned: ExportPlan,
    weights: MixedSource,
    beside: Mapping[str, bytes],
    folder: Path,
    on_progress: OnStage,
) -> list[Artifact]:
    """Write what every target's runtime loads, as large as planned, and what clients read beside it."""
    artifacts: list[Artifact] = []
    license = license_text(planned.checkpoint.license)
    for target in planned.targets:
        progress = partial(on_progress, target)
        job = ExportJob(planned.config, weights, planned.recipe, planned.contract, license, folder, progress)
        artifacts += backend_of(target).exporter()(job)
    for name, content in beside.items():
        (folder / name).write_bytes(content)
    return artifacts


def _described(
    planned: ExportPlan, source: Source, artifacts: Sequence[Artifact], folder: Path
) -> dict[str, FileEntry]:
    """Add the files that describe all others; the entries of every file."""
    files = file_entries(folder)
    for name, content in description_of(planned, source, artifacts, files).items():
        (folder / name).write_bytes(content)
        files[name] = file_entry(folder / name)
    return dict(sorted(files.items()))


def _manifest(
    planned: ExportPlan,
    source: Source,
    artifacts: Sequence[Artifact],
    fp16_range: Status,
    files: Mapping[str, FileEntry],
    activations: ActivationReport | None,
) -> Manifest:
    """The manifest of a folder that is complete but for it."""
    return Manifest(
        tool=__version__,
        libraries=library_versions(planned.targets),
        source=source,
        recipe=planned.recipe,
        artifacts=tuple(artifacts),
        contract=planned.contract,
        fp16_range=fp16_range,
        files=dict(files),
        activations=activations,
    )
