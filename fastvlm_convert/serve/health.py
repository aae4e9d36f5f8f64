"""How the server is: what happened in the last five minutes, and the document at `/health`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fastvlm_convert.serve.engine import EngineStatus

Status = Literal["healthy", "degraded", "unhealthy"]
BreakerState = Literal["closed", "half_open", "open"]

WINDOW_S: Final = 300.0
MAX_REQUESTS: Final = 1 << 16  # 218 a second for five minutes; 1.1 MB

# What `status` follows from, beside breakers and engines that are not ready.
MIN_REQUESTS: Final = 10
"""With fewer requests in the window, their success rate says nothing."""
DEGRADED_BELOW_PERCENT: Final = 95.0
UNHEALTHY_BELOW_PERCENT: Final = 50.0
DEGRADED_QUEUE_SHARE: Final = 0.8

_MIB: Final = 1 << 20


def succeeded(code: int) -> bool | None:
    """Whether a request that ended with an HTTP status speaks for the server.

    Returns:
        True below 400, False from 500; None for 4xx: what clients do wrong, or that they left, says nothing.
    """
    if code >= 500:
        return False
    return True if code < 400 else None


@dataclass(frozen=True)
class Recent:
    """What happened in a window; None where nothing did.

    Attributes:
        requests: Those that succeeded or failed.
        success_rate_percent: Share that succeeded.
        average_ms: Mean time of those that succeeded; refusals are quick, and would hide slow answers.
        p50_ms: Median of the same.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
    """

    requests: int = 0
    success_rate_percent: float | None = None
    average_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None


class Window:
    """The requests of the last five minutes, or the last 65,536 if there were more. Not thread-safe."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        seconds: float = WINDOW_S,
        max_requests: int = MAX_REQUESTS,
    ) -> None:
        """Start empty.

        Args:
            clock: Gives the time, in seconds.
            seconds: How far the window reaches back.
            max_requests: Most requests to remember.
        """
        self._clock = clock
        self._seconds = seconds
        self._ended = np.full(max_requests, -np.inf)
        self._took = np.zeros(max_requests)
        self._ok = np.zeros(max_requests, bool)
        self._next = 0

    def add(self, seconds: float, ok: bool | None, now: float | None = None) -> None:
        """Remember a request.

        Args:
            seconds: How long it took.
            ok: Whether it succeeded, as `succeeded` says; None is not remembered.
            now: When it ended, by the window's clock; None means now.
        """
        if ok is None:
            return
        place = self._next % len(self._ended)
        self._ended[place] = self._clock() if now is None else now
        self._took[place] = seconds
        self._ok[place] = ok
        self._next += 1

    def recent(self) -> Recent:
        """What happened in the window until now."""
        held = min(self._next, len(self._ended))
        inside = self._ended[:held] > self._clock() - self._seconds
        requests = int(np.count_nonzero(inside))
        if requests == 0:
            return Recent()
        ok = self._ok[:held] & inside
        took = self._took[:held][ok] * 1000
        rate = 100 * len(took) / requests
        if len(took) == 0:
            return Recent(requests, rate)
        p50, p95, p99 = np.percentile(took, (50, 95, 99)).tolist()
        return Recent(requests, rate, float(took.mean()), p50, p95, p99)


@dataclass(frozen=True)
class BundleState:
    """A bundle, how its engine is, and its breaker."""

    id: str
    target: str
    sha256: str
    engine: EngineStatus
    breaker_state: BreakerState


@dataclass(frozen=True)
class ServerState:
    """What `/health` is made from.

    Attributes:
        version: Of this program.
        bundles: All that are served; at least one.
        recent: The last five minutes.
        queue_length: Requests that wait.
        queue_limit: How many may.
        expected_wait_s: How long the next one would wait.
        security_enabled: `FAST_VLM_SECURITY_ENABLED`.
        incidents: Recorded since the start.
        scaling: `FAST_VLM_SCALING_STRATEGY`, by which workers come and go; None where their number is fixed.
        answer_hits: Answers found in a cache since the start.
        answer_misses: Answers looked up in vain.
        memory_bytes: Resident memory of this process.
        uptime_s: Since the start.
        is_draining: Whether it ends.
    """

    version: str
    bundles: Sequence[BundleState]
    recent: Recent
    queue_length: int
    queue_limit: int
    expected_wait_s: float
    security_enabled: bool
    incidents: int
    scaling: str | None
    answer_hits: int
    answer_misses: int
    memory_bytes: int
    uptime_s: float
    is_draining: bool = False


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SecurityHealth(_Part):
    """The checks of what clients send."""

    enhanced_security: bool = Field(description="Whether threat rules are applied.")
    total_incidents: int = Field(ge=0, description="Incidents recorded since the start.")
    status: Literal["off", "quiet", "incidents"] = Field(
        description="`quiet` as long as there was no incident since the start."
    )


class ScalingHealth(_Part):
    """Workers and what caches spare them."""

    enabled: bool = Field(description="Whether the number of workers can change.")
    workers: int = Field(ge=0, description="Workers that can answer now, busy ones included.")
    cache_hit_rate: float | None = Field(
        ge=0,
        le=1,
        description="Share of answers found in a cache since the start; null before the first lookup.",
    )
    auto_scaling: str | None = Field(description="The scaling strategy; null where the number is fixed.")


class ModelHealth(_Part):
    """A bundle that is served."""

    id: str = Field(description="What requests call it.")
    target: str = Field(description="Which of its formats is run.")
    executed_by: str = Field(description="What runs it, with its version; empty until it is loaded.")
    sha256: str = Field(description="Of the bundle's manifest, which has the hashes of all its files.")


class QueueHealth(_Part):
    """Requests that wait for a free slot."""

    length: int = Field(ge=0)
    limit: int = Field(ge=0, description="More get 503 at once.")
    expected_wait_ms: float = Field(ge=0, description="How long the next request would wait.")


class LatencyHealth(_Part):
    """Percentiles of requests that succeeded in the last five minutes; null where there were none."""

    p50: float | None
    p95: float | None
    p99: float | None


class HealthDocument(_Part):
    """The document at `/health`."""

    status: Status = Field(
        description="`unhealthy`: nothing can be answered, or most requests fail; `degraded`: some do."
    )
    success_rate_percent: float | None = Field(
        ge=0,
        le=100,
        description="Of the last five minutes, without 4xx, which clients cause; null without requests.",
    )
    circuit_breaker_state: BreakerState = Field(description="The worst of all bundles.")
    average_latency_ms: float | None = Field(
        description="Of requests that succeeded in the last five minutes."
    )
    security: SecurityHealth
    scaling: ScalingHealth
    version: str
    models: list[ModelHealth]
    queue: QueueHealth
    latency_ms: LatencyHealth
    memory_mb: float = Field(description="Resident memory of the server and its workers, in MiB.")
    uptime_s: float


def status_of(state: ServerState) -> Status:
    """Whether the server does what it should.

    Unhealthy: it ends, no bundle can answer (its engine is not ready or its breaker is open), or fewer
    than half of the requests succeed. Degraded: some bundle cannot answer, a breaker is half open, fewer than
    95 % of the requests succeed, or the queue is at 80 % of its limit. A rate counts from 10 requests.
    """
    answering = [b.engine.is_ready and b.breaker_state != "open" for b in state.bundles]
    enough = state.recent.requests >= MIN_REQUESTS
    rate = state.recent.success_rate_percent if enough else None
    if state.is_draining or not any(answering) or (rate is not None and rate < UNHEALTHY_BELOW_PERCENT):
        return "unhealthy"
    is_full = state.queue_limit > 0 and state.queue_length >= DEGRADED_QUEUE_SHARE * state.queue_limit
    is_failing = rate is not None and rate < DEGRADED_BELOW_PERCENT
    if not all(answering) or _worst(state.bundles) != "closed" or is_failing or is_full:
        return "degraded"
    return "healthy"


def health_document(state: ServerState) -> HealthDocument:
    """The document at `/health`."""
    recent = state.recent
    engines = [bundle.engine for bundle in state.bundles]
    memory = state.memory_bytes + sum(engine.memory_bytes for engine in engines)
    return HealthDocument(
        status=status_of(state),
        success_rate_percent=recent.success_rate_percent,
        circuit_breaker_state=_worst(state.bundles),
        average_latency_ms=_rounded(recent.average_ms),
        security=_security(state),
        scaling=_scaling(state),
        version=state.version,
        models=[
            ModelHealth(id=b.id, target=b.target, executed_by=b.engine.executed_by, sha256=b.sha256)
            for b in state.bundles
        ],
        queue=QueueHealth(
            length=state.queue_length,
            limit=state.queue_limit,
            expected_wait_ms=round(state.expected_wait_s * 1000, 3),
        ),
        latency_ms=LatencyHealth(
            p50=_rounded(recent.p50_ms), p95=_rounded(recent.p95_ms), p99=_rounded(recent.p99_ms)
        ),
        memory_mb=round(memory / _MIB, 1),
        uptime_s=round(state.uptime_s, 3),
    )


def _worst(bundles: Sequence[BundleState]) -> BreakerState:
    order: tuple[BreakerState, ...] = ("closed", "half_open", "open")
    return max((bundle.breaker_state for bundle in bundles), key=order.index)


def _security(state: ServerState) -> SecurityHealth:
    status: Literal["off", "quiet", "incidents"] = "incidents" if state.incidents else "quiet"
    return SecurityHealth(
        enhanced_security=state.security_enabled,
        total_incidents=state.incidents,
        status=status if state.security_enabled else "off",
    )


def _scaling(state: ServerState) -> ScalingHealth:
    lookups = state.answer_hits + state.answer_misses
    return ScalingHealth(
        enabled=state.scaling is not None,
        workers=sum(
            b.engine.workers.get("ready", 0) + b.engine.workers.get("busy", 0) for b in state.bundles
        ),
        cache_hit_rate=state.answer_hits / lookups if lookups else None,
        auto_scaling=state.scaling,
    )


def _rounded(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds, 3)
