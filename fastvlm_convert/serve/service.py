"""A served bundle with everything that answers for it, and all of them together."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import psutil

from fastvlm_convert import __version__
from fastvlm_convert.serve.accounting import Accounts
from fastvlm_convert.serve.admission import Admission
from fastvlm_convert.serve.answers import AnswerPath, Answers
from fastvlm_convert.serve.autoscaler import Autoscaler, autoscaler
from fastvlm_convert.serve.breaker import Breaker
from fastvlm_convert.serve.caches import AnswerCache, open_answer_cache
from fastvlm_convert.serve.conversation import Preparing
from fastvlm_convert.serve.engine import Engine, EngineStatus, HasChangingSlots
from fastvlm_convert.serve.escalation import Escalation, make_escalation
from fastvlm_convert.serve.guard import Security
from fastvlm_convert.serve.health import BundleState, ServerState, Window
from fastvlm_convert.serve.lifecycle import Lifecycle
from fastvlm_convert.serve.metrics import Metrics
from fastvlm_convert.serve.prompt_caches import ModelPromptCache, PromptCaches, open_prompt_caches
from fastvlm_convert.serve.router import Router, make_router
from fastvlm_convert.serve.served_bundle import ServedBundle, check_files
from fastvlm_convert.serve.settings import Settings
from fastvlm_convert.serve.threats import rules
from fastvlm_convert.serve.traces import open_traces
from fastvlm_convert.serve.validate import Pictures

K = TypeVar("K")

MakeEngine = Callable[[ServedBundle, Settings, ModelPromptCache | None], Engine]


@dataclass(frozen=True)
class BundleService:
    """A bundle, everything between a request and its answer, and what scales its workers, if any."""

    bundle: ServedBundle
    path: AnswerPath
    answers: Answers
    preparing: Preparing
    scaler: Autoscaler | None


@dataclass(frozen=True)
class Service:
    """Everything that requests need.

    Attributes:
        settings: The server's.
        bundles: By name.
        router: Which of them answers a request.
        escalation: When another one is asked; None for never.
        accounts: What becomes of requests.
        cache: Of whole answers, of all bundles; None where caches are off.
        prompt_caches: Of image features and prefixes, of all bundles; None where caches are off.
        pictures: Decodes pictures.
        security: Keys, rates, bans and incidents.
        lifecycle: The server's phase.
        started_at: In seconds since 1970.
        began: The same, on a clock that nobody sets.
    """

    settings: Settings
    bundles: Mapping[str, BundleService]
    router: Router
    escalation: Escalation | None
    accounts: Accounts
    cache: AnswerCache | None
    prompt_caches: PromptCaches | None
    pictures: Pictures
    security: Security
    lifecycle: Lifecycle
    started_at: float
    began: float

    @property
    def metrics(self) -> Metrics:
        """What is counted."""
        return self.accounts.metrics

    @property
    def readiness(self) -> str:
        """The phase; `failing` where no engine can answer, and the last try to change that failed."""
        statuses = [one.path.engine.status() for one in self.bundles.values()]
        is_failing = all(status.back_in_s is not None for status in statuses)
        return "failing" if is_failing and self.lifecycle.phase == "ready" else self.lifecycle.phase

    async def load(self) -> None:
        """Load all bundles, one after the other.

        Raises:
            ConversionError: One is not what its manifest says, or cannot be loaded.
        """
        for one in self.bundles.values():
            await asyncio.to_thread(check_files, one.bundle.path)
            await one.path.engine.start()
            if one.scaler is not None:
                one.scaler.start()

    async def stop(self) -> None:
        """End all questions and engines at once."""
        for one in self.bundles.values():
            one.answers.stop()
            if one.scaler is not None:
                one.scaler.stop()
        await asyncio.gather(*(bundle.path.engine.stop() for bundle in self.bundles.values()))

    async def close(self) -> None:
        """End everything, once no requests come any more."""
        await self.stop()
        self.pictures.close()
        if self.cache is not None:
            await self.cache.close()
        await asyncio.to_thread(self.accounts.traces.close)
        await asyncio.to_thread(self.security.incidents.close)

    def statuses(self) -> dict[str, EngineStatus]:
        """How the engines are; caches that all bundles share are told once, with the first."""
        statuses = {name: one.path.engine.status() for name, one in self.bundles.items()}
        if self.prompt_caches is not None:
            first = next(iter(statuses))
            statuses[first] = replace(
                statuses[first],
                cache_bytes=_sum(statuses[first].cache_bytes, self.prompt_caches.bytes),
                cache_lookups=_sum(statuses[first].cache_lookups, self.prompt_caches.lookups),
            )
        return statuses

    def rendered_metrics(self) -> bytes:
        """All metrics as they are now, in Prometheus' text format."""
        for name, status in self.statuses().items():
            path = self.bundles[name].path
            self.metrics.set_status(name, status, _waiting(path), path.breaker.state)
        if self.cache is not None:
            self.metrics.set_cache_bytes("answer", self.cache.bytes)
        return self.metrics.render()

    def state(self) -> ServerState:
        """What `/health` is made from."""
        statuses = self.statuses()
        paths = [one.path for one in self.bundles.values()]
        settings = self.settings
        return ServerState(
            version=__version__,
            bundles=[
                BundleState(
                    name, one.bundle.target, one.bundle.sha256, statuses[name], one.path.breaker.state
                )
                for name, one in self.bundles.items()
            ],
            recent=self.accounts.window.recent(),
            queue_length=sum(_waiting(path) for path in paths),
            queue_limit=sum(path.admission.max_queue for path in paths),
            expected_wait_s=max(path.admission.expected_wait_s() for path in paths),
            security_enabled=settings.security_enabled,
            incidents=self.security.incidents.total,
            scaling=settings.scaling_strategy if settings.min_workers < settings.max_workers else None,
            answer_hits=0 if self.cache is None else self.cache.hits,
            answer_misses=0 if self.cache is None else self.cache.misses,
            memory_bytes=psutil.Process().memory_info().rss,
            uptime_s=time.monotonic() - self.began,
            is_draining=self.lifecycle.phase == "draining",
        )


def _waiting(path: AnswerPath) -> int:
    """Requests that wait, wherever the queue is."""
    return path.admission.waiting + path.engine.status().waiting


def make_service(
    settings: Settings,
    bundles: Sequence[ServedBundle],
    make_engine: MakeEngine,
    weights: Mapping[str, float] | None = None,
) -> Service:
    """A service that has loaded nothing yet.

    Args:
        settings: The server's.
        bundles: What is served; at least one.
        make_engine: Makes a bundle's engine.
        weights: Of the bundles in the group; None shares equally.

    Raises:
        UsageError: Names or weights do not fit, or the environment asks for traces that are not offered.
        SettingsError: Keys are needed and there are none, or a file of keys or incidents cannot be used.
        MissingDependencyError: It asks for traces, and the extra `otel` is not installed.
    """
    names = [bundle.name for bundle in bundles]
    router = make_router(names, weights, settings.model_name, settings.escalation_to)
    escalation = make_escalation(settings.escalation_to, settings.escalation_threshold, router)
    metrics = Metrics(__version__, names, [rule.name for rule in rules()])
    accounts = Accounts(metrics, Window(), open_traces(__version__, os.environ))
    security = Security(settings, metrics, accounts.hash_client)
    cache, prompt_caches = open_answer_cache(settings), open_prompt_caches(settings)
    pictures = Pictures(settings)

    def one(bundle: ServedBundle) -> BundleService:
        model = f"{bundle.sha256} {bundle.target}"
        engine = make_engine(
            bundle, settings, None if prompt_caches is None else prompt_caches.of_model(model)
        )
        admission = Admission(settings.max_queue, lambda: engine.status().slots)
        if isinstance(engine, HasChangingSlots):
            engine.watch_slots(admission.dispatch)
        breaker = Breaker(settings.breaker_failures, settings.breaker_reset_seconds)
        path = AnswerPath(engine, admission, breaker, cache)
        scaler = autoscaler(path, settings, metrics)
        return BundleService(
            bundle, path, Answers(bundle.name, path, metrics), Preparing(bundle, settings, pictures), scaler
        )

    return Service(
        settings,
        {bundle.name: one(bundle) for bundle in bundles},
        router,
        escalation,
        accounts,
        cache,
        prompt_caches,
        pictures,
        security,
        Lifecycle(),
        time.time(),
        time.monotonic(),
    )


def _sum(one: Mapping[K, int], other: Mapping[K, int]) -> dict[K, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
