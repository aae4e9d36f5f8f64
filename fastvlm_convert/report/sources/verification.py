"""What `verify --record` wrote into a bundle."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.manifest import Status
from fastvlm_convert.report.sources.not_run import NotRun
from fastvlm_convert.report.texts import target_name
from fastvlm_convert.verification.answers import Answer, AnswerFigures
from fastvlm_convert.verification.check import Check, Measurement, status_of
from fastvlm_convert.verification.diagnosis import nearest
from fastvlm_convert.verification.layers import LayerFigure
from fastvlm_convert.verification.record import VerificationRecord, read_record

_AT_MOST: Final = ("_nats", "max_abs")  # how metrics end of which less is better


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
    """

    target: str
    status: Status
    counts: dict[str, int]
    executed_by: tuple[str, ...]
    nearest: Check | None


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
        figures: The same in figures, one an execution.
        layers: Noise by operation.
        faults: Where targets part from the reference, and why that may be.
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
    figures: tuple[AnswerFigures, ...]
    layers: tuple[LayerNoise, ...]
    faults: tuple[Fault, ...]

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
        answers=record.answers,
        figures=record.answer_figures,
        layers=tuple(_noise(figure) for figure in record.layers),
        faults=tuple(_faults(record)),
    )


def _noise(figure: LayerFigure) -> LayerNoise:
    is_equal = figure.is_run and figure.decibels == math.inf
    by = target_name(figure.target) + (f", {figure.executed_by}" if figure.executed_by else "")
    return LayerNoise(by, figure.name, figure.sqnr_db, is_equal, None if is_equal else figure.reason)


def _faults(record: VerificationRecord) -> Iterator[Fault]:
    for diagnosis in record.diagnoses:
        yield Fault(diagnosis.target, diagnosis.stage, None, diagnosis.text)
    for target, found in record.first_divergence.items():
        if found is not None:
            yield Fault(target, found.stage, found.layer, found.reason)


def verdicts(checks: tuple[Check, ...]) -> tuple[TargetVerdict, ...]:
    """A verdict for each target, in the order of the checks."""
    found = []
    for target in dict.fromkeys(check.target for check in checks):
        own = [check for check in checks if check.target == target]
        closest = nearest(own)
        found.append(
            TargetVerdict(
                target=target,
                status=status_of(own),
                counts=dict(Counter(check.status for check in own)),
                executed_by=tuple(dict.fromkeys(c.executed_by for c in own if c.executed_by is not None)),
                nearest=closest,
            )
        )
    return tuple(found)


def is_at_most(check: Check) -> bool:
    """Whether less is better."""
    return check.metric.endswith(_AT_MOST)
