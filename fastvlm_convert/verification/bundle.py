"""Verify a whole bundle: its files first, then every target in it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fastvlm_convert.checkpoint.checkpoint import Checkpoint, opened, source_hash
from fastvlm_convert.errors import (
    ImageError,
    RecipeError,
    TargetError,
)
from fastvlm_convert.gates import Gates
from fastvlm_convert.manifest import Manifest, Status, changed_files, load_manifest
from fastvlm_convert.predict.export_plan import ExportPlan, plan_export
from fastvlm_convert.progress import OnStage, ignore_stage
from fastvlm_convert.questions import (
    Question,
    every_second_badly_taken,
    read_questions,
    standard_questions,
)
from fastvlm_convert.runtime.loaded import LoadedModel, load_engine, load_reference
from fastvlm_convert.verification.activations import Activations, check_activations, uses_float16
from fastvlm_convert.verification.check import Check, Measurement, equal, not_run, status_of
from fastvlm_convert.verification.client_files import check_clients
from fastvlm_convert.verification.compare import END_TO_END, Comparison, StageGates, compare
from fastvlm_convert.verification.context_end import context_end
from fastvlm_convert.verification.executions import executions
from fastvlm_convert.verification.run_target import Standard, run_target

_QUANTIZED_REFERENCE = (
    "the reference is quantized itself, so what the integers cost cannot be told; "
    "give the float checkpoint it was made from"
)


@dataclass(frozen=True)
class VerifyResult:
    """What was checked and measured, and what the user should know.

    Attributes:
        checks: Figures against their thresholds.
        measurements: Figures that gate nothing.
        warnings: What the user should know.
        num_questions: How many questions were asked.
        reference_sha256: Hash of the reference's files.
    """

    checks: tuple[Check, ...]
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...]
    num_questions: int
    reference_sha256: str

    @property
    def status(self) -> Status:
        """`failed` if any check failed, `not_run` if any was not run, else `passed`."""
        return status_of(self.checks)


def verify(
    bundle: str | Path,
    reference: str | Path | Checkpoint,
    *,
    questions: str | Path | Sequence[Question] | None = None,
    interpret: bool = False,
    on_progress: OnStage = ignore_stage,
) -> VerifyResult:
    """Check a bundle against the checkpoint it was made from.

    Args:
        bundle: Its folder.
        reference: The checkpoint's folder, or what `open_checkpoint` made of it.
        questions: Pictures to compare on: a folder with an optional questions.json, a .jsonl file, or what
            was read of one; None takes 16 generated ones.
        interpret: On a Mac, interpret Core ML packages beside running them.
        on_progress: Called with what is being done and the share of it that is done, 0..1.

    Raises:
        ConversionError: The bundle, the checkpoint or the pictures cannot be read, there are no questions, or
            the reference is another model.
    """
    bundle, manifest, checkpoint = Path(bundle), load_manifest(Path(bundle)), opened(reference)
    asked = _asked(questions)
    if not asked:
        raise ImageError("there are no pictures to verify with", hint="give at least one with its question")
    plan = plan_again(checkpoint, manifest)
    checks = check_files(bundle, manifest, plan, on_progress)
    measurements: list[Measurement] = []
    warnings: list[str] = []
    standard, found, notes = make_standard(plan, manifest, asked, on_progress)
    checks += found.checks
    measurements += found.measurements
    warnings += notes
    for target in manifest.targets:
        for execution in executions(manifest, target, interpret):
            shown = partial(on_progress, execution.name)
            run = run_target(bundle, target, execution, standard, shown)
            checks += run.all_checks
            measurements += [m for found in run.comparisons for m in found.measurements]
            if run.loaded is not None and run.loaded.session.trouble:
                warnings.append(f"{target}, {run.loaded.session.executed_by}: {run.loaded.session.trouble}")
    on_progress("checkpoint", 0.0)
    reference_sha256 = source_hash(checkpoint)
    if reference_sha256 != manifest.source.sha256:
        warnings.append("the bundle was made from other files than this reference (their hashes differ)")
    on_progress("checkpoint", 1.0)
    return VerifyResult(tuple(checks), tuple(measurements), tuple(warnings), len(asked), reference_sha256)


def check_files(
    bundle: Path, manifest: Manifest, plan: ExportPlan, on_progress: OnStage = ignore_stage
) -> list[Check]:
    """Check everything that can be checked without running a model."""
    return [_check_hashes(bundle, manifest, on_progress), *check_clients(bundle, manifest, plan)]


def make_standard(
    plan: ExportPlan, manifest: Manifest, asked: Sequence[Question], on_progress: OnStage = ignore_stage
) -> tuple[Standard, Comparison, tuple[str, ...]]:
    """Load the reference.

    Args:
        plan: What an export of the checkpoint would do.
        manifest: The bundle's.
        asked: At least one question.
        on_progress: Called with what is being done and the share of it that is done, 0..1.

    Returns:
        What targets are held against, the quantizer's share of their differences, and warnings.
    """
    model, found, warnings = _reference(plan, manifest.source.calibration, asked, on_progress)
    end = context_end(model, asked, manifest.recipe.coreml.prefill_chunk)
    return Standard(plan, model, asked, end), found, warnings


def plan_again(checkpoint: Checkpoint, manifest: Manifest) -> ExportPlan:
    """What an export of a checkpoint with a bundle's recipe would do.

    Raises:
        ConversionError: The reference is another model than the bundle's.
    """
    try:
        return plan_export(checkpoint, manifest.recipe, manifest.targets)
    except (RecipeError, TargetError) as error:
        hint = "give the checkpoint that the bundle was made from"
        raise type(error)(f"the reference is another model: {error.args[0]}", hint=hint) from error


def _asked(questions: str | Path | Sequence[Question] | None) -> Sequence[Question]:
    if questions is None:
        return every_second_badly_taken(standard_questions())
    return read_questions(Path(questions)) if isinstance(questions, str | Path) else questions


def _check_hashes(bundle: Path, manifest: Manifest, on_progress: OnStage) -> Check:
    on_progress("files", 0.0)
    changed = changed_files(bundle, manifest)
    on_progress("files", 1.0)
    return equal("bundle", "files", "sha256", len(changed), f"changed: {', '.join(changed)}", None)


def _reference(
    plan: ExportPlan, calibration: str | None, questions: Sequence[Question], on_progress: OnStage
) -> tuple[LoadedModel, Comparison, tuple[str, ...]]:
    """What every target is compared with.

    Args:
        plan: What an export would do.
        calibration: Hash of the data that layers were solved with, if any.
        questions: Pictures and questions.
        on_progress: Called with what is being done and the share of it that is done, 0..1.

    Returns:
        It; the quantizer's share, which is what its integers cost, after a check whether what it computes
        fits into float16; and warnings.
    """
    checkpoint, recipe, context = plan.checkpoint, plan.recipe, plan.contract.context_length
    is_quantized = bool(recipe.quantize) or checkpoint.quantized is not None
    engine: LoadedModel | None = None
    activations = Activations((), ())
    if is_quantized or uses_float16(recipe, plan.targets):
        engine = load_engine(checkpoint, recipe, context, calibration, on_progress)
    if engine is not None and uses_float16(recipe, plan.targets):
        report = partial(on_progress, "activations")
        activations = check_activations(engine, recipe, plan.targets, questions, report)
    checks, warnings = activations.checks, activations.warnings
    if engine is not None and checkpoint.quantized is not None:
        metrics = ("kl_mean_nats", "top1_agreement")
        skipped = [not_run("weights", END_TO_END, metric, _QUANTIZED_REFERENCE) for metric in metrics]
        return engine, Comparison((*checks, *skipped), ()), warnings
    if not is_quantized:
        engine = None  # frees its memory
    loading = partial(on_progress, "reference")
    reference = load_reference(checkpoint, plan.images, plan.prompt, context, loading)
    if engine is None:
        return reference, Comparison(checks, ()), warnings
    gates = _quantizer_gates(recipe.gates)
    found = compare("weights", engine, reference, questions, gates, partial(on_progress, "weights"))
    return engine, replace(found, checks=(*checks, *found.checks)), warnings


def _quantizer_gates(gates: Gates) -> StageGates:
    return StageGates(
        min_sqnr_db={},
        identical_text=False,
        max_new_tokens=gates.max_new_tokens,
        max_kl_mean_nats=gates.quantizer_max_kl_nats,
        min_top1_agreement=gates.quantizer_min_top1,
    )
