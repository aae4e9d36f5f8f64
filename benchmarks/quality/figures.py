"""Figures with intervals, of what was measured token by token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fastvlm_convert.intervals import Interval, bootstrap, paired_bootstrap

ASKED: Final = 36  # questions that `verify` asks by default
REPEATED: Final = 4000
WORST: Final = 0.01  # share of the tokens that the trimmed mean leaves out

Measured = Mapping[str, Any]
"""What `judging.judge` gives of a set, as read from a file."""


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval over pictures or prompts."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Figures:
    """What a scheme costs on a set.

    Attributes:
        kl: Mean divergence from the float model over the tokens of its answers, nats.
        trimmed: The same without the worst 1 % of the tokens.
        top1: Share of tokens that are still the likeliest.
        flips: Share of answers that change.
        accuracy: Share of right answers where one is known; None where none is.
        gained: Accuracy less the float model's.
    """

    kl: Figure
    trimmed: Figure
    top1: Figure
    flips: Figure
    accuracy: Figure | None
    gained: Figure | None


def figures(measured: Measured, base: Measured, clusters: Sequence[int]) -> Figures:
    """All figures of a scheme.

    Args:
        measured: Of the scheme.
        base: Of the float model; only `right` is read.
        clusters: The picture or prompt of each question.
    """
    of_token = np.repeat(clusters, [len(part) for part in measured["kl"]])
    kl, agree = np.concatenate(measured["kl"]), np.concatenate(measured["agree"]).astype(float)
    flipped = np.asarray([not all(part) for part in measured["agree"]], float)
    known = [n for n, right in enumerate(base["right"]) if right is not None]
    accuracy = gained = None
    if known:
        groups = np.asarray(clusters)[known]
        ours, floats = (np.asarray([m["right"][n] for n in known], float) for m in (measured, base))
        accuracy = _mean(ours, groups)
        gained = Figure(float((ours - floats).mean()), paired_bootstrap(ours, floats, clusters=groups))
    return Figures(
        _mean(kl, of_token),
        Figure(trimmed(kl), bootstrap(kl, statistic=trimmed, clusters=of_token, resamples=500)),
        _mean(agree, of_token),
        _mean(flipped, np.asarray(clusters)),
        accuracy,
        gained,
    )


def trimmed(kl: np.ndarray) -> float:
    """The mean without the worst 1 % of the tokens."""
    kept = len(kl) - int(np.ceil(WORST * len(kl)))
    return float(np.partition(kl, kept)[:kept].mean()) if kept < len(kl) else float(kl.mean())


def ratio(measured: Measured, peer: Measured, clusters: Sequence[int]) -> Figure:
    """Mean divergence of a scheme by that of another, on the same tokens, drawn together."""
    sums = np.zeros((max(clusters) + 1, 2))
    for column, found in enumerate((measured, peer)):
        np.add.at(sums[:, column], clusters, [sum(part) for part in found["kl"]])
    pairs = sums[sorted(set(clusters))]
    return Figure(_quotient(pairs), bootstrap(pairs, statistic=_quotient))


def ends_of_a_check(measured: Measured, count: int = ASKED) -> tuple[float, float]:
    """What a sound conversion may reach when `verify` asks so many questions: gates must lie beyond.

    Returns:
        Mean divergence, and share of tokens that are still the likeliest; one in forty drawings of so many
        questions gives a worse one.
    """
    rows = np.asarray(
        [(sum(kl), sum(agree), len(kl)) for kl, agree in zip(measured["kl"], measured["agree"], strict=True)]
    )
    drawn = rows[np.random.default_rng(0).integers(len(rows), size=(REPEATED, count))].sum(axis=1)
    kl, top1 = drawn[:, 0] / drawn[:, 2], drawn[:, 1] / drawn[:, 2]
    return float(np.quantile(kl, 0.975)), float(np.quantile(top1, 0.025))


def better(schemes: Mapping[str, Measured], names: Sequence[str]) -> str | None:
    """The one of some schemes that costs least; None where none was measured."""
    there = [name for name in names if name in schemes]
    return min(there, key=lambda name: np.concatenate(schemes[name]["kl"]).mean()) if there else None


def verdict(figure: Figure, limit: float, at_most: bool = True) -> str:
    """Whether a figure keeps a limit: `met` or `missed`, with a note where the interval holds both."""
    keeps: Callable[[float], bool] = (lambda v: v <= limit) if at_most else (lambda v: v >= limit)
    ends = keeps(figure.interval.low), keeps(figure.interval.high)
    word = "met" if keeps(figure.value) else "missed"
    return word if ends[0] == ends[1] else f"{word}, within the interval"


def _mean(values: np.ndarray, clusters: np.ndarray) -> Figure:
    return Figure(float(values.mean()), bootstrap(values, clusters=clusters))


def _quotient(pairs: np.ndarray) -> float:
    first, second = pairs.sum(axis=0)
    return float(first / second)
