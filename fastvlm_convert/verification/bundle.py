"""Verify a whole bundle: its files first, then every target in it."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastvlm_convert.checkpoint.checkpoint import Checkpoint, source_hash
from fastvlm_convert.errors import BundleError, ImageError, MissingDependencyError, TokenizerError
from fastvlm_convert.io_names import STAGES
from fastvlm_convert.manifest import Manifest, changed_files
from fastvlm_convert.questions import Question
from fastvlm_convert.recipe import Gates
from fastvlm_convert.runtime.loaded import LoadedModel, load_engine, load_reference
from fastvlm_convert.verification.check import Check, Measurement, equal, not_run
from fastvlm_convert.verification.compare import Comparison, StageGates, compare
from fastvlm_convert.verification.executions import executions

OnProgress = Callable[[str, float], None]

_QUANTIZED_REFERENCE = (
    "the reference is quantized itself, so what the integers cost cannot be told; "
    "give the float checkpoint it was made from"
)


@dataclass(frozen=True)
class VerifyResult:
    """What was checked and measured, and what the user should know."""

    checks: tuple[Check, ...]
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...]

    @property
    def status(self) -> str:
        """`failed` if any check failed, `not_run` if any was not run, else `passed`."""
        found = {check.status for check in self.checks}
        return next((s for s in ("failed", "not_run") if s in found), "passed")


def verify(
    bundle: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    questions: Sequence[Question],
    on_progress: OnProgress = lambda stage, share: None,
    *,
    interpret: bool = False,
) -> VerifyResult:
    """Check a bundle against the checkpoint it was made from.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        checkpoint: The reference.
        questions: Pictures and questions.
        on_progress: Called with what is being done and the share of it that is done, 0..1.
        interpret: On a Mac, interpret Core ML packages beside running them.

    Raises:
        ImageError: There are no questions.
    """
    if not questions:
        raise ImageError("there are no pictures to verify with", hint="give at least one with its question")
    on_progress("files", 0.0)
    changed = changed_files(bundle, manifest)
    on_progress("files", 1.0)
    checks = [equal("bundle", "files", "sha256", len(changed), f"changed: {', '.join(changed)}", None)]
    measurements: list[Measurement] = []
    warnings: list[str] = []
    reference, quantizer = _reference(manifest, checkpoint, questions, on_progress)
    checks += quantizer.checks
    measurements += quantizer.measurements
    for target in manifest.targets:
        for execution in executions(manifest, target, interpret):
            try:
                loaded = execution.load(bundle, manifest)
                found = compare(
                    target,
                    loaded,
                    reference,
                    questions[: execution.max_questions],
                    execution.gates,
                    lambda share, name=execution.name: on_progress(name, share),  # type: ignore[misc]
                )
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
    return VerifyResult(tuple(checks), tuple(measurements), tuple(warnings))


def _reference(
    manifest: Manifest, checkpoint: Checkpoint, questions: Sequence[Question], on_progress: OnProgress
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
    reference = load_reference(
        checkpoint,
        contract.image_size,
        contract.image_mode,
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
