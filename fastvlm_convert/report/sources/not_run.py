"""What stands on the page where there is nothing to show."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NotRun:
    """A source that is not there.

    Attributes:
        reason: Why.
        command: What makes it, or None.
    """

    reason: str
    command: str | None
