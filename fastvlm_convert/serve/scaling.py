"""How many workers there should be: one function of the last measurements.

When workers are added or removed is the same for all strategies, from the thresholds below; by how many, and
after how long, is the strategy. Nothing here learns: the same measurements give the same decision.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Strategy = Literal["conservative", "aggressive", "adaptive", "predictive"]
Direction = Literal["up", "down", "none"]

SLOW_MS: Final = 500.0
BUSY_PERCENT: Final = 80.0
MANY_A_SECOND: Final = 10.0  # answers of one worker
FAST_MS: Final = 100.0
IDLE_PERCENT: Final = 30.0
PATIENCE: Final = 3  # measurements that agree before a worker is removed, or a conservative one added
UTILIZATION: Final = 0.7  # of its time that a worker is meant to work
HORIZON_S: Final = 60.0
LEVEL_SHARE: Final = 0.5  # of the newest measurement in Holt's level
TREND_SHARE: Final = 0.1  # and in his trend
CALMER: Final = (
    0.8  # the share of an arrival rate that was too much below which fewer workers are tried again
)


@dataclass(frozen=True)
class Measurement:
    """What was seen in an interval.

    Attributes:
        at_s: When it ended, in seconds of a clock that only goes forward.
        workers: Workers that there were.
        p95_ms: 95th percentile of the time from a request's arrival to the end of its answer; None if no
            request ended.
        cpu_percent: Of the cores that the server may use.
        arrivals_per_s: Requests that came.
        answers_per_s: Requests that a worker answered.
        service_s: Mean time that a worker took for one, without the queue; None where none ended.
        queue: Requests that waited at the end.
    """

    at_s: float
    workers: int
    p95_ms: float | None
    cpu_percent: float
    arrivals_per_s: float
    answers_per_s: float
    service_s: float | None
    queue: int


@dataclass(frozen=True)
class Resources:
    """What there is now.

    Attributes:
        workers: Workers that there are.
        free_cores: Cores that no worker has yet.
        cores_per_worker: Cores that one takes.
        free_bytes: Memory that is free.
        bytes_per_worker: Memory that one takes.
    """

    workers: int
    free_cores: int
    cores_per_worker: int
    free_bytes: int
    bytes_per_worker: int

    @property
    def room(self) -> int:
        """How many more workers cores and memory hold."""
        return max(0, min(self.free_cores // self.cores_per_worker, self.free_bytes // self.bytes_per_worker))


@dataclass(frozen=True)
class Limits:
    """Fewest and most workers."""

    min_workers: int
    max_workers: int


@dataclass(frozen=True)
class Decision:
    """What to do.

    Attributes:
        workers: How many there should be.
        direction: Whether that is more or fewer than there are.
        reason: A word for metrics: why it changes, or what keeps it from changing.
    """

    workers: int
    direction: Direction
    reason: str


def decide(
    strategy: Strategy, window: Sequence[Measurement], resources: Resources, limits: Limits
) -> Decision:
    """How many workers there should be.

    Args:
        strategy: How fast and how far the number follows the load.
        window: Measurements, the newest last; ten minutes of them are enough.
        resources: What there is now.
        limits: Fewest and most workers; fewer or more than that are never asked for.
    """
    now = resources.workers
    if not window:
        return _stay(now, "no_measurements")
    if now > limits.max_workers:
        return Decision(limits.max_workers, "down", "max_workers")
    policy = _POLICIES[strategy]
    if (reason := policy.why_up(window)) is not None:
        return _up(policy.more(window, now), reason, window[-1], resources, limits)
    if (reason := _why_down(window, strategy)) is not None:
        return _down(policy.fewer(window, now), reason, window, now, limits)
    return _stay(now, "within_thresholds")


def _stay(workers: int, reason: str) -> Decision:
    return Decision(workers, "none", reason)


def _up(wanted: int, reason: str, newest: Measurement, resources: Resources, limits: Limits) -> Decision:
    now = resources.workers
    if wanted <= now:
        return _stay(now, "enough_workers")
    if newest.queue == 0:
        return _stay(now, "empty_queue")
    if now >= limits.max_workers:
        return _stay(now, "max_workers")
    if resources.room == 0:
        return _stay(now, "no_room")
    return Decision(min(wanted, limits.max_workers, now + resources.room), "up", reason)


def _down(wanted: int, reason: str, window: Sequence[Measurement], now: int, limits: Limits) -> Decision:
    arrivals = window[-1].arrivals_per_s
    wanted = max(
        wanted,
        limits.min_workers,
        _needed(arrivals, _service_s(window) or 0.0),
        math.ceil(arrivals / MANY_A_SECOND),
    )
    while wanted < now and _was_too_few(window, wanted):
        wanted += 1
    if wanted >= now:
        return _stay(now, "min_workers" if now <= limits.min_workers else "needed")
    return Decision(wanted, "down", reason)


def _was_too_few(window: Sequence[Measurement], workers: int) -> bool:
    """Whether as many workers, or fewer, were too slow for no more load than now.

    Without it the number would swing: what is fast with two workers may be slow with one.
    """
    arrivals = max(m.arrivals_per_s for m in window[-PATIENCE:])
    return any(
        m.workers <= workers and m.queue > 0 and _threshold(m) and arrivals > CALMER * m.arrivals_per_s
        for m in window
    )


def _threshold(measurement: Measurement) -> str | None:
    """The first threshold that a measurement exceeds."""
    if measurement.p95_ms is not None and measurement.p95_ms > SLOW_MS:
        return "latency"
    if measurement.cpu_percent > BUSY_PERCENT:
        return "cpu"
    if measurement.answers_per_s > MANY_A_SECOND * measurement.workers:
        return "throughput"
    return None


def _why_up(window: Sequence[Measurement]) -> str | None:
    """A threshold that the newest measurement exceeds."""
    return _threshold(window[-1])


def _why_up_for_long(window: Sequence[Measurement]) -> str | None:
    """The newest of the thresholds that the last three measurements exceed, with somebody waiting."""
    last = window[-PATIENCE:]
    if len(last) < PATIENCE or not all(_threshold(m) and m.queue for m in last):
        return None
    return _threshold(last[-1])


def _why_up_soon(window: Sequence[Measurement]) -> str | None:
    """A threshold that is exceeded now, or will be when the forecast comes true."""
    if _forecast(window) > MANY_A_SECOND * window[-1].workers:
        return "forecast"
    return _threshold(window[-1])


def _why_down(window: Sequence[Measurement], strategy: Strategy) -> str | None:
    """Whether the last three measurements are fast and idle; nobody waiting for an answer is fast."""
    last = window[-PATIENCE:]
    is_idle = len(last) == PATIENCE and all(
        (m.p95_ms is None or m.p95_ms < FAST_MS) and m.cpu_percent < IDLE_PERCENT and m.queue == 0
        for m in last
    )
    reasons = {"adaptive": "arrival_rate", "predictive": "forecast"}
    return reasons.get(strategy, "idle") if is_idle else None


def _needed(arrivals_per_s: float, service_s: float) -> int:
    """Workers that are busy 70 % of their time with this load."""
    return max(1, math.ceil(arrivals_per_s * service_s / UTILIZATION))


def _service_s(window: Sequence[Measurement]) -> float | None:
    """The newest mean time of a worker for a request; None where no request ended."""
    return next((m.service_s for m in reversed(window) if m.service_s is not None), None)


def _for_rate(rate: Callable[[Sequence[Measurement]], float]) -> Callable[[Sequence[Measurement], int], int]:
    """Workers for a rate of arrivals; as many as there are while nothing is known of their speed."""

    def workers(window: Sequence[Measurement], now: int) -> int:
        arrivals_per_s, service_s = rate(window), _service_s(window)
        if arrivals_per_s and service_s is None:
            return now
        return _needed(arrivals_per_s, service_s or 0.0)

    return workers


def _arrivals(window: Sequence[Measurement]) -> float:
    """Mean rate of the last three measurements."""
    last = window[-PATIENCE:]
    return sum(m.arrivals_per_s for m in last) / len(last)


def _forecast(window: Sequence[Measurement]) -> float:
    """The rate of arrivals in 60 s by Holt's method, which follows a level and a trend; never below 0."""
    level, trend, before = window[0].arrivals_per_s, 0.0, window[0].at_s
    for m in window[1:]:
        passed = m.at_s - before
        expected = level + trend * passed
        new = LEVEL_SHARE * m.arrivals_per_s + (1 - LEVEL_SHARE) * expected
        if passed > 0:
            trend = TREND_SHARE * (new - level) / passed + (1 - TREND_SHARE) * trend
        level, before = new, m.at_s
    return max(0.0, level + trend * HORIZON_S)


@dataclass(frozen=True)
class _Policy:
    """A strategy.

    Attributes:
        why_up: The reason to add workers, or None.
        more: How many there should be then.
        fewer: How many there should be where there is a reason to remove some.
    """

    why_up: Callable[[Sequence[Measurement]], str | None]
    more: Callable[[Sequence[Measurement], int], int]
    fewer: Callable[[Sequence[Measurement], int], int]


_POLICIES: Final[dict[Strategy, _Policy]] = {
    "conservative": _Policy(_why_up_for_long, lambda _, now: now + 1, lambda _, now: now - 1),
    "aggressive": _Policy(_why_up, lambda _, now: 2 * now, lambda _, now: now // 2),
    "adaptive": _Policy(_why_up, _for_rate(_arrivals), _for_rate(_arrivals)),
    "predictive": _Policy(_why_up_soon, _for_rate(_forecast), _for_rate(_forecast)),
}
