"""Results of checks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastvlm_convert.manifest import Status


@dataclass(frozen=True)
class Measurement:
    """A figure that informs and gates nothing.

    Attributes:
        target: Format of the artifact.
        stage: What was compared.
        metric: Name with unit.
        value: The figure, or None where it is not finite: the two are equal, or one holds NaN or infinity.
        exact: Whether the two are equal.
        executed_by: What executed the artifact; None where nothing had to.
    """

    target: str
    stage: str
    metric: str
    value: float | None
    exact: bool
    executed_by: str | None


@dataclass(frozen=True)
class Check(Measurement):
    """A figure against its threshold.

    Attributes:
        threshold: What the value must reach; None where it must be exact.
        status: Passed, failed, or not run.
        reason: Why it failed or was not run, else None.
    """

    threshold: float | None
    status: Status
    reason: str | None


def status_of(checks: Sequence[Check]) -> Status:
    """`failed` if any check failed, `not_run` if any was not run, else `passed`."""
    found = {check.status for check in checks}
    return "failed" if "failed" in found else "not_run" if "not_run" in found else "passed"


def at_least(
    target: str, stage: str, metric: str, value: float | None, threshold: float, executed_by: str
) -> Check:
    """A check that `value` reaches `threshold`; None stands for equality, which passes. NaN fails."""
    if value is not None and not math.isfinite(value):
        reason = "the outputs hold NaN or infinity"
        return Check(target, stage, metric, None, False, executed_by, threshold, "failed", reason)
    passed = value is None or value >= threshold
    why = None if passed else f"{value:.1f} is below {threshold:g}"
    return Check(target, stage, metric, value, value is None, executed_by, threshold, _status(passed), why)


def at_most(target: str, stage: str, metric: str, value: float, threshold: float, executed_by: str) -> Check:
    """A check that `value` does not exceed `threshold`. NaN fails."""
    passed = value <= threshold
    why = None if passed else f"{value:.3g} is above {threshold:g}"
    finite = value if math.isfinite(value) else None
    return Check(target, stage, metric, finite, False, executed_by, threshold, _status(passed), why)


def equal(
    target: str, stage: str, metric: str, differences: int, reason: str, executed_by: str | None
) -> Check:
    """A check that nothing differs; `reason` says what does."""
    passed = differences == 0
    return Check(
        target=target,
        stage=stage,
        metric=metric,
        value=None if passed else float(differences),
        exact=passed,
        executed_by=executed_by,
        threshold=None,
        status=_status(passed),
        reason=None if passed else reason,
    )


def not_run(target: str, stage: str, metric: str, reason: str) -> Check:
    """A check that could not be made."""
    return Check(target, stage, metric, None, False, None, None, "not_run", reason)


def _status(passed: bool) -> Status:
    return "passed" if passed else "failed"
