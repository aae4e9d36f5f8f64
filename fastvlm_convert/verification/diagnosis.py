"""What a person should look at: the stage nearest to its gate, the first that broke, and the likely cause."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.manifest import Manifest
from fastvlm_convert.predict.export_plan import ExportPlan, predicted_files
from fastvlm_convert.verification.causes import Evidence, likely_cause
from fastvlm_convert.verification.check import Check
from fastvlm_convert.verification.layers import Divergence, Layers

_FLOW: Final = (
    "preprocessing", "image_features", "inputs_embeds", "merged_embeds", "prefill_logits", "decode_logits",
    "context_end", "end_to_end", "greedy_text",
)  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """Where a target first breaks a gate, and why that may be.

    Attributes:
        target: The target, `weights`, or `bundle` for what all targets share.
        stage: The first stage, in the order in which data flows, that breaks its gate.
        metric: The figure that breaks it.
        executed_by: What executed the target; None where nothing had to.
        cause: Name in the catalogue of causes; None if none fits.
        text: The cause, in words.
    """

    target: str
    stage: str
    metric: str
    executed_by: str | None
    cause: str | None
    text: str


@dataclass(frozen=True)
class Findings:
    """What is known of a target besides its checks.

    Attributes:
        layers: Its operations, as far as they could be seen.
        divergence: The first of them below its gate.
        trouble: The operation that first gave NaN or infinity.
    """

    layers: Layers | None = None
    divergence: Divergence | None = None
    trouble: str | None = None


def diagnose(
    bundle: Path,
    manifest: Manifest,
    plan: ExportPlan,
    checks: Sequence[Check],
    findings: Mapping[str, Findings],
    *,
    is_same_source: bool,
) -> tuple[Diagnosis, ...]:
    """One diagnosis for each target that fails.

    More than six parameters: all that `verify` knows.

    Args:
        bundle: The bundle's folder.
        manifest: Its manifest.
        plan: What an export of the reference with the manifest's recipe would do.
        checks: All checks.
        findings: What else is known, by target.
        is_same_source: Whether the bundle was made from the reference's files.
    """
    failed = [check for check in checks if check.status == "failed"]
    if not failed:
        return ()
    sizes = _sizes(bundle, plan)
    found = []
    for target in dict.fromkeys(check.target for check in failed):
        first = min((c for c in failed if c.target == target), key=_place)
        known = findings.get(target, Findings())
        evidence = Evidence(
            target=target,
            checks=[c for c in checks if c.target in ("bundle", target)],
            layers=known.layers,
            divergence=known.divergence,
            contract=plan.contract if target == "weights" else manifest.contract,
            expected=plan.contract,
            is_head_tied=plan.config.decoder.tied,
            is_quantized=bool(plan.recipe.quantize),
            is_calibrated=plan.is_calibrated,
            is_same_source=is_same_source,
            sizes=sizes,
            trouble=known.trouble,
        )
        cause, text = likely_cause(evidence, first.stage) or (None, "no cause of the catalogue fits")
        found.append(Diagnosis(target, first.stage, first.metric, first.executed_by, cause, text))
    return tuple(found)


def share_used(check: Check) -> float | None:
    """How much of the error that a gate allows a figure takes: 0 is none, 1 stands at the gate.

    Of decibels, the amplitude of the noise; of a share to be reached, what is missing to 1. None where there
    is no such figure: the two are equal, or the check was not run.
    """
    value, gate = check.value, check.threshold
    if value is None or gate is None:
        return None
    if check.metric.endswith("_db"):
        return float(10 ** ((gate - value) / 20))
    if check.metric == "top1_agreement":
        return (1 - value) / (1 - gate) if gate < 1 else float(value < 1)
    return value / gate if gate else float(value > 0)


def nearest(checks: Sequence[Check]) -> Check | None:
    """The check that is nearest to its gate, or beyond it by most; None if none has a figure."""
    used = [(share, check) for check in checks if (share := share_used(check)) is not None]
    return max(used, key=lambda pair: pair[0])[1] if used else None


def _place(check: Check) -> int:
    """Where a check stands in the flow of data; what a target's files say of themselves comes first."""
    return _FLOW.index(check.stage) if check.stage in _FLOW else -1


def _sizes(bundle: Path, plan: ExportPlan) -> dict[str, tuple[int, int]]:
    """Bytes that files should have, and have; what is missing is left out."""
    paths = {name: (size, bundle / name) for name, size in predicted_files(plan).items()}
    return {name: (size, path.stat().st_size) for name, (size, path) in paths.items() if path.is_file()}
