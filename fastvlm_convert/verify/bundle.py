"""Verify a whole bundle: its files first, then every target in it."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvlm_convert.checkpoint.checkpoint import Checkpoint, content_hash
from fastvlm_convert.contract import STAGES
from fastvlm_convert.errors import BundleError, MissingDependencyError, TokenizerError
from fastvlm_convert.manifest import Manifest, changed_files
from fastvlm_convert.recipe import Gates
from fastvlm_convert.runtime.loaded import load_engine, load_reference
from fastvlm_convert.verify.check import Check, Measurement, equal, not_run
from fastvlm_convert.verify.compare import StageGates, compare
from fastvlm_convert.verify.executions import executions
from fastvlm_convert.questions import Question

OnProgress = Callable[[str, float], None]


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
    """
    contract = manifest.contract
    on_progress("files", 0.0)
    changed = changed_files(bundle, manifest)
    on_progress("files", 1.0)
    checks = [equal("bundle", "files", "sha256", len(changed), f"changed: {', '.join(changed)}", None)]
    measurements: list[Measurement] = []
    warnings: list[str] = []
    reference = load_reference(
        checkpoint,
        contract.image_size,
        contract.image_mode,
        contract.context_length,
        lambda share: on_progress("reference", share),
    )
    if manifest.recipe.quantize:
        engine = load_engine(
            checkpoint,
            manifest.recipe,
            contract.context_length,
            lambda share: on_progress("quantize", share),
        )
        found = compare(
            "weights",
            engine,
            reference,
            questions,
            _quantizer_gates(manifest.recipe.gates),
            lambda share: on_progress("weights", share),
        )
        checks += found.checks
        measurements += found.measurements
        reference = engine
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
    if content_hash(checkpoint.files) != manifest.source.sha256:
        warnings.append("the bundle was made from other files than this reference (their hashes differ)")
    on_progress("checkpoint", 1.0)
    return VerifyResult(tuple(checks), tuple(measurements), tuple(warnings))


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
