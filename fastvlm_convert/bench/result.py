"""What was measured: distributions, with the samples they come from, so that runs can be compared later."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from fastvlm_convert.bench.machine import Machine
from fastvlm_convert.bench.threads import Pinning
from fastvlm_convert.intervals import MINIMUM, Interval, bootstrap

# What is measured of an answer, in the order in which it happens.
LATENCIES: Final[tuple[str, ...]] = (
    "prepare_ms",
    "vision_ms",
    "prefill_ms",
    "ttft_ms",
    "decode_ms",
    "end_to_end_ms",
)
RATES: Final[tuple[str, ...]] = ("prefill_tokens_per_s", "decode_tokens_per_s")  # larger is better
METRICS: Final = (*LATENCIES, *RATES)
RUN: Final = "run_ms"  # one run of one graph, of a tool that does not know which part of an answer it is
ENERGY: Final = "energy_j"  # of one answer, end to end
KNOWN: Final = (*METRICS, RUN, ENERGY)
CALIBRATION: Final = "calibration_ms"

MIN_ROUNDS_P99: Final = 100  # with fewer, the 99th percentile is the maximum under another name


@dataclass(frozen=True)
class Spread:
    """Distribution of a metric over the rounds.

    Attributes:
        p50: Median.
        p90: What 90 % of the rounds were at least as good as.
        p99: What 99 % were at least as good as; None with fewer than 100 rounds, which cannot tell it from
            the worst.
        min: Least.
        max: Largest.
    """

    p50: float
    p90: float
    p99: float | None
    min: float
    max: float


@dataclass(frozen=True)
class ContenderResult:
    """What was measured of one contender.

    Attributes:
        name: Its name.
        executed_by: What executed it.
        measured_on: The machine or phone.
        imported_from: Format of the file that the figures come from; None where this run measured them.
        load_ms: Time to load it, once; None where the file does not say.
        peak_memory_bytes: Most memory its process had resident; None where the file does not say.
        file_bytes: Size of its files; None where the file does not say.
        warmup: The first answer after loading, by metric; it counts nowhere else.
        metrics: Distribution of every metric over the rounds after that.
        samples: Every round's figure, by metric.
        ratio_to_reference: Per metric, the median over the rounds of its figure over the reference's of the
            same round; empty without a reference.
        ratio_interval: The same as intervals; empty with fewer than 30 rounds.
        energy_not_run: Why there is no `energy_j`; None where there is.
    """

    name: str
    executed_by: str
    measured_on: str
    imported_from: str | None
    load_ms: float | None
    peak_memory_bytes: int | None
    file_bytes: int | None
    warmup: dict[str, float]
    metrics: dict[str, Spread]
    samples: dict[str, tuple[float, ...]]
    ratio_to_reference: dict[str, float]
    ratio_interval: dict[str, Interval]
    energy_not_run: str | None


@dataclass(frozen=True)
class Settings:
    """How a run measured.

    Attributes:
        trials: Rounds that count; one before them warms up.
        new_tokens: Length of every answer.
        image_size: Edge of the input of the image encoder, in pixels.
        pinning: Threads and processors of every contender.
        calibration_ms: What a fixed piece of work took in each round.
    """

    trials: int
    new_tokens: int
    image_size: int
    pinning: Pinning
    calibration_ms: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """A contender's metric against a baseline.

    Attributes:
        contender: Its name.
        metric: What was compared; None where nothing could be.
        kind: `paired`: both were measured in the same rounds. `unpaired`: in two runs.
        basis: What each figure was divided by before runs were compared: `reference`, `calibration loop` or
            `nothing`; for pairs it is `same round`.
        ratio: New over old, above 1 where it got slower; None where it was not run.
        interval: Where the ratio lies.
        status: `failed` where the whole interval lies beyond what is allowed.
        message: The finding in words.
    """

    contender: str
    metric: str | None
    kind: Literal["paired", "unpaired"]
    basis: Literal["same round", "reference", "calibration loop", "nothing"]
    ratio: float | None
    interval: Interval | None
    status: Literal["passed", "failed", "not_run"]
    message: str


@dataclass(frozen=True)
class BenchResult:
    """A whole run; what `--json` prints, `--save-baseline` writes and `--against` reads.

    Attributes:
        machine: Where it ran; None where all figures are imported.
        settings: How it measured; None where all figures are imported.
        contenders: What was measured.
        against: The baseline that they were compared with, if any.
        max_regression_percent: How much slower than that is allowed; None without a baseline.
        comparisons: What came of it.
        notes: What a reader should know.
    """

    machine: Machine | None
    settings: Settings | None
    contenders: tuple[ContenderResult, ...]
    against: str | None = None
    max_regression_percent: float | None = None
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> Literal["passed", "failed", "not_run"]:
        """What came of the comparisons."""
        statuses = {comparison.status for comparison in self.comparisons}
        return "failed" if "failed" in statuses else "not_run" if "not_run" in statuses else "passed"


def spread_of(metric: str, samples: Sequence[float]) -> Spread:
    """The distribution of a metric's samples."""
    is_rate = metric in RATES
    p50, p90, p99 = (
        float(q) for q in np.quantile(samples, [0.5, *([0.1, 0.01] if is_rate else [0.9, 0.99])])
    )
    enough = len(samples) >= MIN_ROUNDS_P99
    return Spread(p50, p90, p99 if enough else None, float(min(samples)), float(max(samples)))


def spreads_of(samples: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """The distribution of every metric, in the order of an answer."""
    return {metric: spread_of(metric, samples[metric]) for metric in KNOWN if metric in samples}


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, Interval | None]:
    """The median of the rounds' ratios, and where it lies; no interval below 30 rounds.

    Args:
        ours: Figures above 0, one a round.
        theirs: Those that they are divided by, of the same rounds.
    """
    logs = np.log(np.asarray(ours)) - np.log(np.asarray(theirs))
    ratio = float(np.exp(np.median(logs)))
    if len(logs) < MINIMUM:
        return ratio, None
    return ratio, exponential(log_interval(logs))


def log_interval(logs: np.ndarray) -> Interval:
    """The interval of the median of some logarithms, one a round."""
    return bootstrap(logs, statistic=lambda drawn: float(np.median(drawn)))


def exponential(interval: Interval) -> Interval:
    """The interval of what an interval of logarithms stands for."""
    return Interval(float(np.exp(interval.low)), float(np.exp(interval.high)), interval.level)
