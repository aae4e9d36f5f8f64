"""What a rule is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from fastvlm_convert.lint.facts import Facts
from fastvlm_convert.lint.platform import Platform
from fastvlm_convert.outcomes import Severity
from fastvlm_convert.targets import Target

_FEW: Final = 3  # names that a message lists


@dataclass(frozen=True)
class Hit:
    """A place that breaks a rule.

    Attributes:
        message: What is there.
        where: File of the bundle, or None for the whole.
    """

    message: str
    where: str | None = None


class NotCheckedError(Exception):
    """A rule cannot be checked here; its message says why."""


def always(platform: Platform) -> bool:
    """Of a rule that holds wherever a bundle runs."""
    del platform
    return True


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        id: Its name, which stays.
        severity: What a hit means where the rule applies for certain. Where nobody said whether it does, an
            error is a warning.
        reason: Why, in a line.
        source: Public report or document that says so.
        advice: What to do about a hit.
        check: Finds what breaks the rule.
        scope: Where it applies, for people.
        applies: Whether it applies on a platform; None where the platform does not say.
        targets: Formats it is about; none of them is read for a rule about the bundle as a whole.
    """

    id: str
    severity: Severity
    reason: str
    source: str
    advice: str
    check: Callable[[Facts, Platform], Iterable[Hit]]
    scope: str = "everywhere"
    applies: Callable[[Platform], bool | None] = always
    targets: tuple[Target, ...] = ()


def named(names: Iterable[str]) -> str:
    """How many there are, and the first few: `24 (l0_attn, l1_attn, l2_attn, ...)`."""
    all_names = list(names)
    shown = ", ".join(all_names[:_FEW]) + (", ..." if len(all_names) > _FEW else "")
    return f"{len(all_names)} ({shown})"
