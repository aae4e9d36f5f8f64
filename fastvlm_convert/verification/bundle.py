"""Verify a whole bundle: its files first, then every target in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from fastvlm_convert.checkpoint.checkpoint import Checkpoint, opened, source_hash
from fastvlm_convert.errors import BundleError, ImageError, RecipeError, TargetError
from fastvlm_convert.gates import Gates
from fastvlm_convert.heap import return_freed_memory
from fastvlm_convert.manifest import Manifest, Status, changed_files, load_manifest
from fastvlm_convert.predict.export_plan import ExportPlan, plan_export
from fastvlm_convert.progress import OnStage, ignore_stage
from fastvlm_convert.quantization.prepared_weights import calibrated_coverage
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.questions import Question, hard_questions, read_questions
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.runtime.loaded import LoadedModel, load_engine, load_reference
from fastvlm_convert.targets import Target
from fastvlm_convert.verification.activations import check_activations, uses_float16
from fastvlm_convert.verification.answers import Answer, AnswerFigures, Candidate, figures_of
from fastvlm_convert.verification.check import Check, Measurement, equal, not_run, status_of
from fastvlm_convert.verification.client_files import check_clients
from fastvlm_convert.verification.compare import END_TO_END, Comparison, StageGates, compare
from fastvlm_convert.verification.context_end import context_end
from fastvlm_convert.verification.coverage import coverage_warnings
from fastvlm_convert.verification.diagnosis import Diagnosis, Findings, diagnose
from fastvlm_convert.verification.execution import Execution
from fastvlm_convert.verification.executions import executions
from fastvlm_convert.verification.layers import (
    CandidateValues,
    Divergence,
    LayerFigure,
    ReferenceValues,
    first_divergence,
    layers_not_run,
    swapped_features_db,
)
from fastvlm_convert.verification.reference_run import ReferenceRun, remembering, run_questions
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
        answers: Every answer of every execution, beside the reference's.
        layers: Every operation of every execution whose values can be seen, on the first picture.
        first_divergence: By target, the first operation below its gate; None where there is none.
        diagnoses: Of each target that fails, the first stage that breaks its gate, and the likely cause.
    """

    checks: tuple[Check, ...]
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...]
    num_questions: int
    reference_sha256: str
    answers: tuple[Answer, ...] = ()
    layers: tuple[LayerFigure, ...] = ()
    first_divergence: Mapping[str, Divergence | None] = field(default_factory=dict)
    diagnoses: tuple[Diagnosis, ...] = ()

    @property
    def status(self) -> Status:
        """`failed` if any check failed, `not_run` if any was not run, else `passed`."""
        return status_of(self.checks)

    @cached_property
    def figures(self) -> tuple[AnswerFigures, ...]:
        """The answers of each execution in figures."""
        keys = dict.fromkeys((a.target, a.executed_by) for a in self.answers)
        return tuple(figures_of([a for a in self.answers if (a.target, a.executed_by) == k]) for k in keys)


@dataclass
class Found:
    """What was found so far, and by target what may explain it."""

    checks: list[Check] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    layers: list[LayerFigure] = field(default_factory=list)
    findings: dict[str, Findings] = field(default_factory=dict)

    def add(self, comparison: Comparison) -> None:
        self.checks += comparison.checks
        self.measurements += comparison.measurements
        self.answers += comparison.answers


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
            was read of one; None takes `hard_questions`.
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
    files = check_files(bundle, manifest, plan, on_progress)
    standard, found = make_standard(plan, manifest, asked, on_progress)
    found.checks[:0] = files
    for target in manifest.targets:
        found.findings[target] = Findings()
        for execution in executions(manifest, target, interpret):
            _run(bundle, (target, execution), standard, found, on_progress)
    on_progress("checkpoint", 0.0)
    reference_sha256 = source_hash(checkpoint)
    is_same_source = reference_sha256 == manifest.source.sha256
    if not is_same_source:
        found.warnings.append(
            "the bundle was made from other files than this reference (their hashes differ)"
        )
    on_progress("checkpoint", 1.0)
    diagnoses = diagnose(bundle, manifest, plan, found.checks, found.findings, is_same_source=is_same_source)
    return VerifyResult(
        checks=tuple(found.checks),
        measurements=tuple(found.measurements),
        warnings=tuple(found.warnings),
        num_questions=len(asked),
        reference_sha256=reference_sha256,
        answers=tuple(found.answers),
        layers=tuple(found.layers),
        first_divergence={target: found.findings[target].divergence for target in manifest.targets},
        diagnoses=diagnoses,
    )


def _run(
    bundle: Path,
    run: tuple[Target, Execution],
    standard: Standard,
    found: Found,
    on_progress: OnStage,
) -> None:
    """Compare one execution of a target with the reference."""
    target, execution = run
    ran = run_target(bundle, target, execution, standard, partial(on_progress, execution.name))
    found.checks += ran.checks
    if ran.loaded is None:
        found.layers += layers_not_run(target, standard.values.names, str(ran.reason)).figures
        return
    for comparison in ran.comparisons:
        found.add(comparison)
    _look_inside(bundle, run, standard, ran.loaded, found)
    on_progress(execution.name, 1.0)
    if ran.loaded.session.trouble:
        found.warnings.append(f"{target}, {ran.loaded.session.executed_by}: {ran.loaded.session.trouble}")


def _look_inside(
    bundle: Path, run: tuple[Target, Execution], standard: Standard, loaded: LoadedModel, found: Found
) -> None:
    """Compare what operations give; where a gate of the execution broke, find the first that parts."""
    target, execution = run
    values, by, known = standard.values, loaded.session.executed_by, found.findings[target]
    if execution.expose is None:
        layers = layers_not_run(target, values.names, f"{by} hands out no values between operations")
    else:
        theirs = CandidateValues(values)
        try:
            execution.expose(bundle, load_manifest(bundle), loaded, theirs)
            layers = theirs.figures(target, by)
        except BundleError as error:
            layers = layers_not_run(target, values.names, str(error))
    found.layers += layers.figures
    failed = {c.stage for c in found.checks if c.status == "failed" and c.executed_by == by}
    if not failed or known.divergence is not None:
        return
    if "image_features" in failed and values.pixel_values is not None:
        layers = replace(layers, swapped_features_db=swapped_features_db(loaded, values))
    parted = first_divergence(layers, execution.gates.min_sqnr_db)
    found.findings[target] = Findings(layers, parted, known.trouble or loaded.session.trouble)


def check_files(
    bundle: Path, manifest: Manifest, plan: ExportPlan, on_progress: OnStage = ignore_stage
) -> list[Check]:
    """Check everything that can be checked without running a model."""
    return [_check_hashes(bundle, manifest, on_progress), *check_clients(bundle, manifest, plan)]


def make_standard(
    plan: ExportPlan, manifest: Manifest, asked: Sequence[Question], on_progress: OnStage = ignore_stage
) -> tuple[Standard, Found]:
    """Load the reference.

    Args:
        plan: What an export of the checkpoint would do.
        manifest: The bundle's.
        asked: At least one question.
        on_progress: Called with what is being done and the share of it that is done, 0..1.

    Returns:
        What targets are held against; and whether what it computes fits into float16, and the quantizer's
        share of the differences.
    """
    found = Found()
    standard = _reference(plan, manifest.source.calibration, asked, found, on_progress)
    return_freed_memory()  # gigabytes, of two models
    return standard, found


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
        return hard_questions()
    return read_questions(Path(questions)) if isinstance(questions, str | Path) else questions


def _check_hashes(bundle: Path, manifest: Manifest, on_progress: OnStage) -> Check:
    on_progress("files", 0.0)
    changed = changed_files(bundle, manifest)
    on_progress("files", 1.0)
    return equal("bundle", "files", "sha256", len(changed), f"changed: {', '.join(changed)}", None)


def _reference(
    plan: ExportPlan,
    calibration: str | None,
    questions: Sequence[Question],
    found: Found,
    on_progress: OnStage,
) -> Standard:
    """What every target is compared with; one model at a time is in memory, and none is afterwards.

    Args:
        plan: What an export would do.
        calibration: Hash of the data that layers were solved with, if any.
        questions: Pictures and questions.
        found: Gets the quantizer's share, which is what its integers cost, after a check whether what it
            computes fits into float16.
        on_progress: Called with what is being done and the share of it that is done, 0..1.
    """
    checkpoint, recipe, context = plan.checkpoint, plan.recipe, plan.contract.context_length
    is_quantized = bool(recipe.quantize) or checkpoint.quantized is not None
    floats: _Answers | None = None
    if checkpoint.quantized is None:
        model = remembering(_load_float(plan, on_progress))
        floats = _answers(model, plan, questions, on_progress)
        if not is_quantized and not _changes_floats(recipe):
            _check_float16(model, floats, plan, found, on_progress)
        if not is_quantized:
            end = context_end(model, questions, recipe.coreml.prefill_chunk)
            if _changes_floats(recipe) and uses_float16(recipe, plan.targets):
                model = load_engine(checkpoint, recipe, context, None, on_progress)
                _check_float16(model, floats, plan, found, on_progress)
            return Standard(plan, *floats, questions, end)
        del model
        return_freed_memory()
    engine = remembering(load_engine(checkpoint, recipe, context, calibration, on_progress))
    return_freed_memory()
    runs, values = answers = _answers(engine, plan, questions, on_progress, floats)
    if floats is None:
        metrics = ("kl_mean_nats", "top1_agreement")
        found.checks += [not_run("weights", END_TO_END, metric, _QUANTIZED_REFERENCE) for metric in metrics]
    else:
        float_runs, float_values = floats
        candidate = Candidate("weights", engine, [run.token_ids for run in runs])
        gates, comparing = _quantizer_gates(recipe.gates), partial(on_progress, "weights")
        # First what is watched: the comparison then knows this prompt.
        layers = float_values.again(engine, values).figures("weights", engine.session.executed_by)
        found.add(compare(candidate, float_runs, questions, gates, comparing))
        found.layers += layers.figures
        calibrated = calibrated_coverage(plan_weights(checkpoint, recipe), calibration)
        found.warnings += [] if calibrated is None else coverage_warnings(calibrated, float_runs)
        del floats, float_runs, float_values
    _check_float16(engine, answers, plan, found, on_progress)
    return Standard(plan, *answers, questions, context_end(engine, questions, recipe.coreml.prefill_chunk))


_Answers = tuple[tuple[ReferenceRun, ...], ReferenceValues]


def _changes_floats(recipe: Recipe) -> bool:
    """Whether a recipe's repairs give other activations than the checkpoint."""
    return bool(recipe.repairs.residual_shift or recipe.repairs.rescaled_keys)


def _load_float(plan: ExportPlan, on_progress: OnStage) -> LoadedModel:
    context, loading = plan.contract.context_length, partial(on_progress, "reference")
    return load_reference(plan.checkpoint, plan.images, plan.prompt, context, loading)


def _answers(
    model: LoadedModel,
    plan: ExportPlan,
    questions: Sequence[Question],
    on_progress: OnStage,
    others: _Answers | None = None,
) -> _Answers:
    """What a model makes of the questions, and what its operations give for the first with a picture.

    Args:
        model: The model.
        plan: What an export would do.
        questions: Pictures and questions.
        on_progress: Called with what is being done and the share of it that is done, 0..1.
        others: What another model made of them, which this one is like.
    """
    shown = next((q for q in questions if q.images), questions[0])
    asking = partial(on_progress, "answers")
    values = ReferenceValues(model, shown)  # before the picture is known: it watches how that is encoded
    hints = None if others is None else others[0]
    return run_questions(model, questions, plan.recipe.gates.max_new_tokens, asking, hints), values


def _check_float16(
    model: LoadedModel, answers: _Answers, plan: ExportPlan, found: Found, on_progress: OnStage
) -> None:
    """Check whether what a model computes fits into float16, where the recipe rounds to that."""
    if not uses_float16(plan.recipe, plan.targets):
        return
    report = partial(on_progress, "activations")
    activations = check_activations(model, plan.recipe, plan.targets, answers[0], report)
    found.checks += activations.checks
    found.warnings += activations.warnings


def _quantizer_gates(gates: Gates) -> StageGates:
    return StageGates(
        min_sqnr_db={},
        identical_text=False,
        max_new_tokens=gates.max_new_tokens,
        max_kl_mean_nats=gates.quantizer_max_kl_nats,
        min_top1_agreement=gates.quantizer_min_top1,
    )
