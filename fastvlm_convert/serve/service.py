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
from fastvlm_convert.serve.breaker import Breaker
from fastvlm_convert.serve.caches import AnswerCache, open_answer_cache
from fastvlm_convert.serve.conversation import Preparing
from fastvlm_convert.serve.engine import Engine, EngineStatus, HasChangingSlots
from fastvlm_convert.serve.errors import NotFoundError
from fastvlm_convert.serve.health import BundleState, ServerState, Window
from fastvlm_convert.serve.lifecycle import Lifecycle
from fastvlm_convert.serve.metrics import Metrics
from fastvlm_convert.serve.prompt_caches import ModelPromptCache, PromptCaches, open_prompt_caches
from fastvlm_convert.serve.served_bundle import ServedBundle
from fastvlm_convert.serve.settings import Settings
from fastvlm_convert.serve.threats import rules
from fastvlm_convert.serve.traces import open_traces
from fastvlm_convert.serve.validate import Pictures

K = TypeVar("K")

MakeEngine = Callable[[ServedBundle, Settings, ModelPromptCache | None], Engine]


@dataclass(frozen=True)
class BundleService:
    """A bundle, and everything between a request and its answer."""

    bundle: ServedBundle
    path: AnswerPath
    answers: Answers
    preparing: Preparing


@dataclass(frozen=True)
class Service:
    """Everything that requests need.

    Attributes:
        settings: The server's.
        bundles: By name, the first is the one that answers where none is named.
        accounts: What becomes of requests.
        cache: Of whole answers, of all bundles; None where caches are off.
        prompt_caches: Of image features and prefixes, of all bundles; None where caches are off.
        pictures: Decodes pictures.
        lifecycle: The server's phase.
        started_at: In seconds since 1970.
    """

    settings: Settings
    bundles: Mapping[str, BundleService]
    accounts: Accounts
    cache: AnswerCache | None
    prompt_caches: PromptCaches | None
    pictures: Pictures
    lifecycle: Lifecycle
    started_at: float

    @property
    def metrics(self) -> Metrics:
        """What is counted."""
        return self.accounts.metrics

    @property
    def models(self) -> tuple[str, ...]:
        """Names that requests may give."""
        return tuple(self.bundles)

    def chosen(self, name: str | None) -> BundleService:
        """The bundle of a request.

        Raises:
            NotFoundError: There is none of that name.
        """
        if name is None:
            return next(iter(self.bundles.values()))
        if name not in self.bundles:
            raise NotFoundError(
                f"there is no model of that name; there are: {', '.join(self.bundles)}",
                "model",
                code="model_not_found",
            )
        return self.bundles[name]

    async def load(self) -> None:
        """Load all bundles, one after the other.

        Raises:
            ConversionError: One cannot be loaded.
        """
        for bundle in self.bundles.values():
            await bundle.path.engine.start()

    async def stop(self) -> None:
        """End all engines at once."""
        await asyncio.gather(*(bundle.path.engine.stop() for bundle in self.bundles.values()))

    async def close(self) -> None:
        """End everything, once no requests come any more."""
        await self.stop()
        self.pictures.close()
        if self.cache is not None:
            await self.cache.close()
        await asyncio.to_thread(self.accounts.traces.close)

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
            self.metrics.set_status(name, status, path.admission.waiting, path.breaker.state)
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
            queue_length=sum(path.admission.waiting for path in paths),
            queue_limit=sum(path.admission.max_queue for path in paths),
            expected_wait_s=max(path.admission.expected_wait_s() for path in paths),
            security_enabled=settings.security_enabled,
            incidents=0,
            scaling=settings.scaling_strategy if settings.min_workers < settings.max_workers else None,
            answer_hits=0 if self.cache is None else self.cache.hits,
            answer_misses=0 if self.cache is None else self.cache.misses,
            memory_bytes=psutil.Process().memory_info().rss,
            uptime_s=time.time() - self.started_at,
            is_draining=self.lifecycle.phase == "draining",
        )


def make_service(settings: Settings, bundles: Sequence[ServedBundle], make_engine: MakeEngine) -> Service:
    """A service that has loaded nothing yet.

    Raises:
        UsageError: The environment asks for traces that are not offered.
        MissingDependencyError: It asks for traces, and the extra `otel` is not installed.
    """
    metrics = Metrics(__version__, [bundle.name for bundle in bundles], [rule.name for rule in rules()])
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
        return BundleService(
            bundle, path, Answers(bundle.name, path, metrics), Preparing(bundle, settings, pictures)
        )

    return Service(
        settings,
        {bundle.name: one(bundle) for bundle in bundles},
        Accounts(metrics, Window(), open_traces(__version__, os.environ)),
        cache,
        prompt_caches,
        pictures,
        Lifecycle(),
        time.time(),
    )


def _sum(one: Mapping[K, int], other: Mapping[K, int]) -> dict[K, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
