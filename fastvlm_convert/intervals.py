"""Bootstrap intervals: how far a figure may be off because other pictures could have been asked about.

The percentile method, over whole clusters (a picture with all its questions, an answer with all its tokens):
what belongs together is drawn together, because it is not independent.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

Statistic = Literal["mean"] | Callable[[np.ndarray], float]
"""The mean, or any function of values in the shape in which they were given, to one number."""

MINIMUM: Final = 30  # clusters; the percentile method covers too little with fewer
RESAMPLES: Final = 2000
LEVEL: Final = 0.95


@dataclass(frozen=True)
class Interval:
    """Where a figure lies.

    Attributes:
        low: Lower end.
        high: Upper end.
        level: Share of repetitions of the whole experiment whose intervals hold the true figure.
    """

    low: float
    high: float
    level: float


def too_few(num_clusters: int, noun: str = "pictures") -> str | None:
    """Why so few clusters get no interval, for people; None where they are enough.

    Args:
        num_clusters: How many there are.
        noun: What they are, in the plural.
    """
    if num_clusters >= MINIMUM:
        return None
    some = noun.removesuffix("s") if num_clusters == 1 else noun
    return f"no interval: {num_clusters} {some}, and fewer than {MINIMUM} say too little about others"


def bootstrap(
    values: np.ndarray | Sequence[float],
    *,
    statistic: Statistic = "mean",
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
    clusters: Sequence[Hashable] | np.ndarray | None = None,
) -> Interval:
    """The interval of a statistic; equal arguments give equal intervals.

    Callers give at least `MINIMUM` clusters, or say that there is no interval (`too_few`).

    Args:
        values: Observations along the first axis, at least one.
        statistic: What is computed of them.
        resamples: How often as many clusters as there are get drawn, with replacement.
        seed: Of the drawing.
        level: Share that the interval shall cover, in (0, 1).
        clusters: The cluster of each observation; None makes each its own.

    Raises:
        ValueError: There are no values, or not as many clusters.
    """
    array = _observations(values)
    groups = _groups(len(array), clusters)
    if statistic == "mean":
        draw = _mean_of(array.astype(np.float64), groups)
    else:
        draw = _statistic_of(array, groups, statistic)
    rng = np.random.default_rng(seed)
    count = len(groups)
    drawn = [draw(rng.integers(count, size=count)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


def paired_bootstrap(
    a: np.ndarray | Sequence[float],
    b: np.ndarray | Sequence[float],
    *,
    statistic: Statistic = "mean",
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
    clusters: Sequence[Hashable] | np.ndarray | None = None,
) -> Interval:
    """The interval of `statistic(a) - statistic(b)`, drawing the same clusters of both every time.

    What makes an item hard is hard for both and cancels out, so this is narrower than two intervals apart.

    More than six parameters: those of `bootstrap`, of which it is the twin.

    Args:
        a: Observations along the first axis.
        b: The same items' observations of the other.
        statistic: What is computed of either.
        resamples: See `bootstrap`, as for the rest.
        seed: Of the drawing.
        level: Share that the interval shall cover.
        clusters: The cluster of each item.

    Raises:
        ValueError: There are no values, or not as many of both and clusters.
    """
    first, second = _observations(a), _observations(b)
    if first.shape != second.shape:
        raise ValueError(f"values of shapes {first.shape} and {second.shape} are no pairs")
    pairs = np.stack([first, second], axis=1).astype(np.float64)
    difference: Statistic
    if statistic == "mean":
        pairs, difference = pairs[:, 0] - pairs[:, 1], "mean"
    else:
        # mypy does not carry the narrowing into the function.
        function = statistic

        def difference(drawn: np.ndarray) -> float:
            return function(drawn[:, 0]) - function(drawn[:, 1])

    return bootstrap(
        pairs, statistic=difference, resamples=resamples, seed=seed, level=level, clusters=clusters
    )


def _observations(values: np.ndarray | Sequence[float]) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim == 0 or len(array) == 0:
        raise ValueError("there are no values")
    return array


def _groups(count: int, clusters: Sequence[Hashable] | np.ndarray | None) -> list[np.ndarray]:
    """Indices of each cluster's observations, in the order in which clusters first appear."""
    if clusters is None:
        return list(np.arange(count)[:, None])
    if len(clusters) != count:
        raise ValueError(f"{count} values and {len(clusters)} clusters")
    members: dict[Hashable, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    return [np.asarray(indices) for indices in members.values()]


def _mean_of(values: np.ndarray, groups: Sequence[np.ndarray]) -> Callable[[np.ndarray], float]:
    """The mean over the clusters drawn, from each cluster's sum and size."""
    if values.ndim != 1:
        raise ValueError(f"the mean is of one number an observation, not of shape {values.shape[1:]}")
    sums = np.asarray([values[indices].sum() for indices in groups])
    sizes = np.asarray([len(indices) for indices in groups])
    return lambda drawn: float(sums[drawn].sum() / sizes[drawn].sum())


def _statistic_of(
    values: np.ndarray, groups: Sequence[np.ndarray], statistic: Callable[[np.ndarray], float]
) -> Callable[[np.ndarray], float]:
    return lambda drawn: float(statistic(values[np.concatenate([groups[n] for n in drawn])]))
