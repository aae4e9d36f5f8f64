"""What `lint` finds about a bundle, by its own function."""

from dataclasses import dataclass
from typing import Final

from fastvlm_convert.outcomes import Outcome

_ORDER: Final = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True)
class Lint:
    """What was found.

    Attributes:
        findings: Rules that found something, errors first.
        not_run: Rules that could not be applied.
        num_passed: Rules that found nothing.
    """

    findings: tuple[Outcome, ...]
    not_run: tuple[Outcome, ...]
    num_passed: int


def sorted_lint(outcomes: tuple[Outcome, ...]) -> Lint:
    """Outcomes of rules as the page tells them."""
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    return Lint(
        findings=tuple(sorted(failed, key=lambda outcome: _ORDER[outcome.severity])),
        not_run=tuple(outcome for outcome in outcomes if outcome.status == "not_run"),
        num_passed=sum(outcome.status == "passed" for outcome in outcomes),
    )
