"""What `verify --record` wrote into a bundle."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.manifest import Status
from fastvlm_convert.report.sources.not_run import NotRun
from fastvlm_convert.verification.check import Check, Measurement, status_of
from fastvlm_convert.verification.record import read_record

_AT_MOST: Final = ("_nats", "max_abs")  # how metrics end of which less is better


@dataclass(frozen=True)
class Answer:
    """One question's answers.

    Attributes:
        target: What answered.
        executed_by: What executed it.
        picture: Label of the question's picture; None for a question of text alone.
        question: The question.
        reference_text: What the checkpoint answers.
        bundle_text: What the bundle answers.
        first_difference: Place of the first token that differs, or None.
        kl_nats: Divergence of each token of the reference's answer, where it is finite.
    """

    target: str
    executed_by: str
    picture: str | None
    question: str
    reference_text: str
    bundle_text: str
    first_difference: int | None
    kl_nats: tuple[float, ...]


@dataclass(frozen=True)
class LayerNoise:
    """Noise in the output of one operation.

    Attributes:
        by: What ran it, in words.
        name: The operation.
        sqnr_db: Signal to noise, or None.
        is_equal: Whether there is no noise at all.
        reason: Why there is no figure, else None.
    """

    by: str
    name: str
    sqnr_db: float | None
    is_equal: bool
    reason: str | None


@dataclass(frozen=True)
class Fault:
    """What breaks a gate, or where a target first parts from the reference.

    Attributes:
        target: The target.
        stage: The stage that shows it.
        layer: The operation, where it is known.
        text: What is likely wrong, or the figures.
    """

    target: str
    stage: str
    layer: str | None
    text: str


@dataclass(frozen=True)
class TargetVerdict:
    """What the checks of one target come to.

    Attributes:
        target: `bundle` and `weights` for what all targets share.
        status: The verdict.
        counts: Checks by status.
        executed_by: What executed it.
        nearest: The check that has the least room left, or None where none has a threshold.
        room_used: Share of that check's room that is used up; 1 is at its gate.
    """

    target: str
    status: Status
    counts: dict[str, int]
    executed_by: tuple[str, ...]
    nearest: Check | None
    room_used: float | None


@dataclass(frozen=True)
class Verification:
    """What was recorded.

    Attributes:
        tool: Version that verified.
        reference_sha256: Hash of the checkpoint.
        num_questions: How many questions were asked.
        status: What came of it.
        checks: Every check.
        measurements: Every measurement.
        warnings: What was odd.
        targets: A verdict each.
        answers: Answers side by side.
        layers: Noise by operation.
        faults: Where targets part from the reference, and why that may be.
        missing: What the record lacks, and why.
    """

    tool: str
    reference_sha256: str
    num_questions: int
    status: Status
    checks: tuple[Check, ...]
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...]
    targets: tuple[TargetVerdict, ...]
    answers: tuple[Answer, ...]
    layers: tuple[LayerNoise, ...]
    faults: tuple[Fault, ...]
    missing: tuple[str, ...]

    @property
    def unsettled(self) -> tuple[Check, ...]:
        """Checks that failed, then those that were not run."""
        return tuple(
            check for status in ("failed", "not_run") for check in self.checks if check.status == status
        )


def read_verification(bundle: Path, command: str) -> Verification | NotRun:
    """The record of a bundle.

    Args:
        bundle: Its folder.
        command: What makes a record.

    Raises:
        BundleError: The record is damaged, of another version, or about another manifest.
    """
    record = read_record(bundle)
    if record is None:
        return NotRun("the bundle has no verification.json", command)
    return Verification(
        tool=record.tool,
        reference_sha256=record.reference_sha256,
        num_questions=record.num_questions,
        status=record.status,
        checks=record.checks,
        measurements=record.measurements,
        warnings=record.warnings,
        targets=verdicts(record.checks),
        answers=(),
        layers=(),
        faults=(),
        missing=(),
    )


def verdicts(checks: tuple[Check, ...]) -> tuple[TargetVerdict, ...]:
    """A verdict for each target, in the order of the checks."""
    found = []
    for target in dict.fromkeys(check.target for check in checks):
        own = [check for check in checks if check.target == target]
        used = [(share, check) for check in own if (share := room_used(check)) is not None]
        nearest = max(used, key=lambda pair: pair[0], default=None)
        found.append(
            TargetVerdict(
                target=target,
                status=status_of(own),
                counts=dict(Counter(check.status for check in own)),
                executed_by=tuple(dict.fromkeys(c.executed_by for c in own if c.executed_by is not None)),
                nearest=None if nearest is None else nearest[1],
                room_used=None if nearest is None else nearest[0],
            )
        )
    return tuple(found)


def room_used(check: Check) -> float | None:
    """Share of a check's room that is used up, 1 at its gate; None without threshold or figure."""
    value, gate = check.value, check.threshold
    if value is None or gate is None:
        return None
    if is_at_most(check):
        return value / gate if gate else float(value > 0)
    if check.metric == "top1_agreement":  # a share: what is missing counts
        return (1 - value) / (1 - gate) if gate < 1 else float(value < 1)
    return gate / value if value > 0 else float("inf")


def is_at_most(check: Check) -> bool:
    """Whether less is better."""
    return check.metric.endswith(_AT_MOST)
