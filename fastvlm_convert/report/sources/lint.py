"""What `lint` finds about a bundle, by its own function."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.lint.run import lint
from fastvlm_convert.lint.table import RULES
from fastvlm_convert.outcomes import Outcome

_ORDER: Final = {"error": 0, "warning": 1, "info": 2}


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
    """A rule that was broken.

    Attributes:
        outcome: Severity and message.
        where: Every place where it is, the same message each.
        about: What is known of the rule, or None.
    """

    outcome: Outcome
    where: tuple[str, ...]
    about: About | None


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
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.status == "failed":
            groups.setdefault((outcome.id, outcome.message), []).append(outcome)
    findings = [
        Finding(group[0], tuple(o.where for o in group if o.where is not None), rules.get(id_))
        for (id_, _), group in groups.items()
    ]
    return Lint(
        findings=tuple(sorted(findings, key=lambda finding: _ORDER[finding.outcome.severity])),
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
