"""Progress callbacks: the library reports through them, and only the command line knows about bars."""

from collections.abc import Callable

OnShare = Callable[[float], None]
"""Called with the share of a task that is done, 0..1."""

OnStage = Callable[[str, float], None]
"""Called with the name of a stage and the share of it that is done, 0..1."""


def ignore_share(share: float) -> None:
    """An `OnShare` for callers that want no progress."""


def ignore_stage(stage: str, share: float) -> None:
    """An `OnStage` for callers that want no progress."""
