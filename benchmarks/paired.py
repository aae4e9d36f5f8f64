"""Figures of several contenders that took turns: ratios within a round, so that what slowed all cancels."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """The middle of some figures, and how far they lie apart.

    Attributes:
        median: Half of them are below it.
        low: The lower quartile.
        high: The upper quartile.
    """

    median: float
    low: float
    high: float

    def text(self, digits: int) -> str:
        """`1.23 [1.20, 1.31]`."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def spread(values: np.ndarray) -> Spread:
    """The spread of at least one figure, [rounds]."""
    low, median, high = np.quantile(np.asarray(values, np.float64), [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high))


def paired_ratio(ours: np.ndarray, theirs: np.ndarray) -> Spread:
    """The spread of the ratio of two figures of the same round, [rounds] each.

    Raises:
        ValueError: They are not of the same rounds.
    """
    if np.shape(ours) != np.shape(theirs):
        raise ValueError(f"{np.shape(ours)} and {np.shape(theirs)} are no pairs")
    return spread(np.asarray(ours, np.float64) / np.asarray(theirs, np.float64))


def turns(names: list[str], num_round: int) -> list[str]:
    """The order of a round: each begins with the next one, so that nobody always follows the same."""
    start = num_round % len(names)
    return names[start:] + names[:start]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
