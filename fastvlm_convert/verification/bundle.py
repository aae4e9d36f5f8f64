"""Verify a whole bundle: its files first, then every target in it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastvlm_convert.checkpoint.checkpoint import Checkpoint, opened, source_hash
from fastvlm_convert.errors import BundleError, MissingDependencyError, TokenizerError
from fastvlm_convert.io_names import STAGES
from fastvlm_convert.manifest import Manifest, Status, changed_files, load_manifest
from fastvlm_convert.progress import OnStage, ignore_stage
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.questions import Question, read_questions, standard_questions
from fastvlm_convert.recipe import Gates
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle, load_engine, load_reference
from fastvlm_convert.verification.check import Check, Measurement, equal, not_run
from fastvlm_convert.verification.compare import Comparison, StageGates, compare
from fastvlm_convert.verification.executions import executions

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
    """

    checks: tuple[Check, ...]
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...]
    num_questions: int

    @property
    def status(self) -> Status:
        """`failed` if any check failed, `not_run` if any was not run, else `passed`."""
        found = {check.status for check in self.checks}
        return "failed" if "failed" in found else "not_run" if "not_run" in found else "passed"


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
        ConversionError: The bundle, the checkpoint or the pictures cannot be read, or the reference is
            another model.
    """
    bundle, manifest, checkpoint = Path(bundle), load_manifest(Path(bundle)), opened(reference)
    asked = _asked(questions)
    on_progress("files", 0.0)
    changed = changed_files(bundle, manifest)
    on_progress("files", 1.0)
    checks = [equal("bundle", "files", "sha256", len(changed), f"changed: {', '.join(changed)}", None)]
    measurements: list[Measurement] = []
    warnings: list[str] = []
    model, quantizer = _reference(manifest, checkpoint, asked, on_progress)
    checks += quantizer.checks
    measurements += quantizer.measurements
    for target in manifest.targets:
        for execution in executions(manifest, target, interpret):
            shown = partial(on_progress, execution.name)
            try:
                loaded = load_bundle(bundle, target, execution.precision)
                some = asked[: execution.max_questions]
                found = compare(target, loaded, model, some, execution.gates, shown)
            except (BundleError, TokenizerError, MissingDependencyError) as error:
                checks += [not_run(target, s, _metric(s), str(error)) for s in STAGES]
                continue
            checks += found.checks
            measurements += found.measurements
            if loaded.session.trouble:
                warnings.append(f"{target}, {loaded.session.executed_by}: {loaded.session.trouble}")
    on_progress("checkpoint", 0.0)
    if source_hash(checkpoint) != manifest.source.sha256:
        warnings.append("the bundle was made from other files than this reference (their hashes differ)")
    on_progress("checkpoint", 1.0)
    return VerifyResult(tuple(checks), tuple(measurements), tuple(warnings), len(asked))


def _asked(questions: str | Path | Sequence[Question] | None) -> Sequence[Question]:
    if questions is None:
        return standard_questions()
    return read_questions(Path(questions)) if isinstance(questions, str | Path) else questions


def _reference(
    manifest: Manifest, checkpoint: Checkpoint, questions: Sequence[Question], on_progress: OnStage
) -> tuple[LoadedModel, Comparison]:
    """What every target is compared with, and the quantizer's share: what its integers cost."""
    recipe, contract = manifest.recipe, manifest.contract

    def engine() -> LoadedModel:
        calibration = manifest.source.calibration
        return load_engine(checkpoint, recipe, contract.context_length, calibration, on_progress)

    if checkpoint.quantized is not None:
        metrics = ("kl_mean_nats", "top1_agreement")
        skipped = [not_run("weights", "answers", metric, _QUANTIZED_REFERENCE) for metric in metrics]
        return engine(), Comparison(tuple(skipped), ())
    plan = plan_weights(checkpoint, recipe)
    reference = load_reference(
        checkpoint,
        plan.images,
        plan.prompt,
        contract.context_length,
        lambda share: on_progress("reference", share),
    )
    if not recipe.quantize:
        return reference, Comparison((), ())
    candidate = engine()
    gates, report = _quantizer_gates(recipe.gates), partial(on_progress, "weights")
    return candidate, compare("weights", candidate, reference, questions, gates, report)


def _quantizer_gates(gates: Gates) -> StageGates:
    return StageGates(
        min_sqnr_db={},
        identical_text=False,
        max_new_tokens=gates.max_new_tokens,
        max_kl_mean_nats=gates.quantizer_max_kl_nats,
        min_top1_agreement=gates.quantizer_min_top1,
    )


def _metric(stage: str) -> str:
    return "token_ids" if stage == "greedy_text" else "sqnr_db"


def to_dict(result: Check | Measurement) -> dict[str, object]:
    """A check or measurement as plain data."""
    return dataclasses.asdict(result)
