"""What `lint` finds about a bundle, by its own function."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.lint.run import lint
from fastvlm_convert.lint.table import RULES
from fastvlm_convert.outcomes import Outcome, Severity

_ORDER: Final[tuple[Severity, ...]] = ("error", "warning", "info")


@dataclass(frozen=True)
class About:
    """What is known of a rule.

    Attributes:
        reason: Why it is one.
        source: Public report that it comes from.
        advice: What to do about a finding.
    """

    reason: str
    source: str
    advice: str


@dataclass(frozen=True)
class Finding:
    """A rule that something breaks.

    Attributes:
        places: What breaks it, at least one.
        about: What is known of the rule, or None.
    """

    places: tuple[Outcome, ...]
    about: About | None

    @property
    def severity(self) -> Severity:
        """The worst of its places."""
        return min((place.severity for place in self.places), key=_ORDER.index)


@dataclass(frozen=True)
class Lint:
    """What was found.

    Attributes:
        findings: What breaks rules, errors first.
        not_run: Rules that could not be applied.
        num_passed: Rules that nothing breaks.
    """

    findings: tuple[Finding, ...]
    not_run: tuple[Outcome, ...]
    num_passed: int


def sorted_lint(outcomes: Sequence[Outcome], rules: dict[str, About]) -> Lint:
    """Outcomes of rules as the page tells them.

    Args:
        outcomes: What was found.
        rules: What is known of them, by id.
    """
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.status == "failed":
            groups.setdefault(outcome.id, []).append(outcome)
    findings = [Finding(tuple(group), rules.get(id_)) for id_, group in groups.items()]
    return Lint(
        findings=tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.severity))),
        not_run=tuple(outcome for outcome in outcomes if outcome.status == "not_run"),
        num_passed=sum(outcome.status == "passed" for outcome in outcomes),
    )


def read_lint(bundle: Path) -> Lint:
    """What is publicly known to go wrong with a bundle, wherever it may run.

    Raises:
        BundleError: A graph or a package in it is damaged.
    """
    rules = {rule.id: About(rule.reason, rule.source, rule.advice) for rule in RULES.values()}
    return sorted_lint(lint(bundle).outcomes, rules)
