"""What the server counts, in Prometheus' text format.

No label has a value that a client chooses: a model that is not served, and a reason or rule that is not
known, counts as `other`. Every series is there from the start, at 0, so that alerts see the first event, too.
"""

import threading
from collections import Counter as Counts
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar, get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastvlm_convert.serve.engine import CacheUse, EngineStatus, StageTimings, WorkerState
from fastvlm_convert.serve.errors import UnavailableReason
from fastvlm_convert.serve.escalation import Outcome

Family = TypeVar("Family", Counter, Histogram)

OTHER: Final = "other"
NO_CACHE: Final = "none"
"""The label `cache` of requests that got no answer."""
ERROR_CODES: Final = (400, 401, 404, 405, 408, 413, 415, 422, 429, 499, 500, 503, 504)
REJECTED: Final = (*get_args(UnavailableReason), "rate_limited", "deadline")
ACTIONS: Final = ("record", "block", "reject", "ban")
BREAKER_STATES: Final = ("closed", "open", "half_open")
STAGES: Final = ("vision", "prefill", "decode")
SERVER_CACHES: Final = ("answer",)
"""The cache of whole answers, in memory and on disk; the server's own."""
ENGINE_CACHES: Final = ("feature", "prefix")
SCALING: Final = {
    "up": ("latency", "cpu", "throughput", "arrival_rate", "forecast"),
    "down": ("idle", "arrival_rate", "forecast"),
}
"""Why the number of workers changes, by direction."""
BUCKETS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)  # fmt: skip
"""Seconds: from an answer that was cached to one that nobody waits for any longer."""

_UNKNOWN: Final = EngineStatus(False, 0, 0, {}, 0, "", {}, {})


class Metrics:
    """The server's metrics, in a registry of their own.

    Attributes:
        registry: Holds them all, those of the process included.
        content_type: Of what `render` returns.
    """

    content_type: Final = CONTENT_TYPE_LATEST

    def __init__(self, version: str, models: Sequence[str], rules: Iterable[str] = ()) -> None:
        """Make every series, at 0.

        Args:
            version: Of this program.
            models: Names of the bundles that are served; no other name becomes a label.
            rules: Names of what incidents are recorded for; all others count as `other`.
        """
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, and nothing reads it
        self.registry = CollectorRegistry()
        self._models = frozenset(models)
        self._rules = frozenset(rules)
        self._make_requests()
        self._make_events()
        self._fill(models)
        self._state = _State(models)
        self.registry.register(self._state)
        ProcessCollector(registry=self.registry)
        Info("fastvlm_build", "Version of the server.", registry=self.registry).info({"version": version})

    def _make_requests(self) -> None:
        of_model = ["model"]
        self._requests = self._counter("requests", "Requests that ended.", [*of_model, "code", "cache"])
        self._duration = self._histogram("request_duration", "From request to last byte.", of_model)
        self._queue = self._histogram("queue_duration", "Waited for a free slot.", of_model)
        self._first = self._histogram("time_to_first_token", "From request to first token.", of_model)
        self._inter = self._histogram("inter_token", "From one token to the next.", of_model)
        self._stage = self._histogram("stage", "Stages of answers, where they ran.", [*of_model, "stage"])
        self._prompt = self._counter("prompt_tokens", "Tokens of computed prompts, images' too.", of_model)
        self._answer = self._counter("answer_tokens", "Tokens generated.", of_model)

    def _make_events(self) -> None:
        self._rejected = self._counter("rejected", "Requests refused, or given up.", ["reason"])
        self._escalations = self._counter(
            "escalations", "Answers judged, by the bundle that gave them.", ["model", "outcome"]
        )
        self._cancelled = Counter("fastvlm_cancelled", "Requests whose client left.", registry=self.registry)
        self._deduplicated = Counter(
            "fastvlm_deduplicated", "Requests that shared a running answer.", registry=self.registry
        )
        self._incidents = self._counter("incidents", "Incidents recorded.", ["rule", "action"])
        self._scaling = self._counter(
            "scaling_decisions", "Changes of the number of workers.", ["direction", "reason"]
        )

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> "_Series[Counter]":
        return _Series(Counter(f"fastvlm_{name}", text, labels, registry=self.registry))

    def _histogram(self, name: str, text: str, labels: Sequence[str]) -> "_Series[Histogram]":
        name = f"fastvlm_{name}_seconds"
        return _Series(Histogram(name, text, labels, buckets=BUCKETS, registry=self.registry))

    def _fill(self, models: Sequence[str]) -> None:
        """Make the series that events will move."""
        for model in models:
            for cache in get_args(CacheUse):
                self._requests.at(model, "200", cache)
            for durations in (self._queue, self._first, self._inter):
                durations.at(model)
            for tokens in (self._prompt, self._answer):
                tokens.at(model)
            for stage in STAGES:
                self._stage.at(model, stage)
            for outcome in get_args(Outcome):
                self._escalations.at(model, outcome)
        for model in (*models, OTHER):
            self._duration.at(model)
            for code in ERROR_CODES:
                self._requests.at(model, str(code), NO_CACHE)
        for reason in (*REJECTED, OTHER):
            self._rejected.at(reason)
        for rule in (*sorted(self._rules), OTHER):
            for action in (*ACTIONS, OTHER):
                self._incidents.at(rule, action)
        for direction, reasons in SCALING.items():
            for reason in (*reasons, OTHER):
                self._scaling.at(direction, reason)

    def _model(self, model: str | None) -> str:
        return model if model in self._models else OTHER

    def request_finished(self, model: str | None, code: int, cache: CacheUse | None, seconds: float) -> None:
        """Count a request that ended, however it did.

        Args:
            model: The bundle that it was for; None where that is not known, as without a valid key.
            code: The HTTP status; 499 where the client left.
            cache: The best cache that its answer came from; None where it got no answer.
            seconds: From its arrival to the last byte.
        """
        name = self._model(model)
        self._requests.at(name, str(code), cache or NO_CACHE).inc()
        self._duration.at(name).observe(seconds)

    def queued(self, model: str, seconds: float) -> None:
        """Record how long a request waited for a slot."""
        self._queue.at(self._model(model)).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """Record the time from a request to the first token of its answer."""
        self._first.at(self._model(model)).observe(seconds)

    def inter_token(self, model: str, seconds: float) -> None:
        """Record the time from one token to the next."""
        self._inter.at(self._model(model)).observe(seconds)

    def stages(self, model: str, timings: StageTimings) -> None:
        """Record the stages that an answer went through; one that took no time came from a cache."""
        name = self._model(model)
        spent = (timings.vision_ms, timings.prefill_ms, timings.decode_ms)
        for stage, milliseconds in zip(STAGES, spent, strict=True):
            if milliseconds > 0:
                self._stage.at(name, stage).observe(milliseconds / 1000)

    def tokens(self, model: str, prompt: int, answer: int) -> None:
        """Count the tokens of a prompt and of its answer, where the answer was computed."""
        name = self._model(model)
        self._prompt.at(name).inc(prompt)
        self._answer.at(name).inc(answer)

    def rejected(self, reason: str) -> None:
        """Count a request that the server refused or gave up; `reason` is the error's `code`."""
        self._rejected.at(_known(reason, REJECTED)).inc()

    def cancelled(self) -> None:
        """Count a request whose client left."""
        self._cancelled.inc()

    def deduplicated(self) -> None:
        """Count a request that got the answer of another one that was running."""
        self._deduplicated.inc()

    def escalated(self, model: str, outcome: Outcome) -> None:
        """Count an answer that was kept or escalated."""
        self._escalations.at(self._model(model), outcome).inc()

    def incident(self, rule: str, action: str) -> None:
        """Count an incident; `action` is what became of the request."""
        self._incidents.at(_known(rule, self._rules), _known(action, ACTIONS)).inc()

    def scaling_decision(self, direction: str, reason: str) -> None:
        """Count a change of the number of workers, `up` or `down`.

        Raises:
            KeyError: It is neither.
        """
        self._scaling.at(direction, _known(reason, SCALING[direction])).inc()

    def cache_lookup(self, cache: str, result: str) -> None:
        """Count a `hit` or `miss` of a cache of the server's own (`SERVER_CACHES`).

        Engines count the lookups of theirs: `EngineStatus.cache_lookups`.
        """
        self._state.cache_lookup(_known(cache, SERVER_CACHES), result)

    def set_cache_bytes(self, cache: str, held: int) -> None:
        """Say how many bytes a cache of the server's own holds (`SERVER_CACHES`)."""
        self._state.cache_bytes[_known(cache, SERVER_CACHES)] = held

    def set_status(self, model: str, status: EngineStatus, waiting: int, breaker_state: str) -> None:
        """Say how a bundle is; call it for each of them right before `render`.

        Args:
            model: The bundle's name.
            status: Of its engine. Totals in it may only grow.
            waiting: Requests that wait for a slot.
            breaker_state: One of `BREAKER_STATES`.
        """
        if model in self._models:
            self._state.engines[model] = _Status(status, waiting, breaker_state)

    def render(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Series(Generic[Family]):
    """The series of a family. Prometheus' client takes a lock and longer to find one than to move it."""

    def __init__(self, family: Family) -> None:
        self._family: Family = family
        self._found: dict[tuple[str, ...], Family] = {}

    def at(self, *labels: str) -> Family:
        """The series with these values of its labels."""
        found = self._found.get(labels)
        if found is None:
            found = self._found[labels] = self._family.labels(*labels)
        return found


@dataclass(frozen=True)
class _Status:
    """How a bundle was when it was last asked."""

    engine: EngineStatus = _UNKNOWN
    waiting: int = 0
    breaker_state: str = "closed"


class _State(Collector):
    """What has a state rather than events, and what engines count themselves."""

    def __init__(self, models: Iterable[str]) -> None:
        self.engines = {model: _Status() for model in models}
        self.cache_bytes = dict.fromkeys(SERVER_CACHES, 0)
        self._lookups: Counts[tuple[str, str]] = Counts()
        self._lock = threading.Lock()

    def cache_lookup(self, cache: str, result: str) -> None:
        with self._lock:
            self._lookups[cache, result] += 1

    def collect(self) -> Iterator[Metric]:
        """The families, from what was last said; what an engine does not mention is 0."""
        running = _gauge("requests_running", "Requests that run.", ["model"])
        waiting = _gauge("requests_waiting", "Requests that wait for a free slot.", ["model"])
        breaker = _gauge(
            "breaker_state", "1 for the state that the circuit breaker is in.", ["model", "state"]
        )
        workers = _gauge("workers", "Workers by state.", ["model", "state"])
        restarts = _total("worker_restarts", "Workers started again.", ["model"])
        for model, now in self.engines.items():
            running.add_metric([model], now.engine.running)
            waiting.add_metric([model], now.waiting)
            restarts.add_metric([model], now.engine.restarts)
            for state in BREAKER_STATES:
                breaker.add_metric([model, state], now.breaker_state == state)
            for worker_state in get_args(WorkerState):
                workers.add_metric([model, worker_state], now.engine.workers.get(worker_state, 0))
        yield from (running, waiting, breaker, workers, restarts)
        yield from self._caches()

    def _caches(self) -> Iterator[Metric]:
        size = _gauge("cache_bytes", "Bytes that a cache holds.", ["cache"])
        lookups = _total("cache_lookups", "Lookups in a cache.", ["cache", "result"])
        engines = [now.engine for now in self.engines.values()]
        with self._lock:
            counted = Counts(self._lookups)
        for engine in engines:
            counted.update(engine.cache_lookups)
        for cache in (*SERVER_CACHES, *ENGINE_CACHES):
            held = self.cache_bytes.get(cache, 0) + sum(
                engine.cache_bytes.get(cache, 0) for engine in engines
            )
            size.add_metric([cache], held)
            for result in ("hit", "miss"):
                lookups.add_metric([cache, result], counted[cache, result])
        yield from (size, lookups)


def _gauge(name: str, text: str, labels: Sequence[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"fastvlm_{name}", text, labels=labels)


def _total(name: str, text: str, labels: Sequence[str]) -> CounterMetricFamily:
    return CounterMetricFamily(f"fastvlm_{name}", text, labels=labels)


def _known(value: str, known: Container[str]) -> str:
    return value if value in known else OTHER
