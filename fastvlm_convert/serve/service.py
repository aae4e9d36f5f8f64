"""A served bundle with everything that answers for it, and all of them together."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fastvlm_convert import __version__
from fastvlm_convert.serve.admission import Admission
from fastvlm_convert.serve.answers import AnswerPath, Answers
from fastvlm_convert.serve.breaker import Breaker
from fastvlm_convert.serve.caches import AnswerCache, open_answer_cache
from fastvlm_convert.serve.engine import Engine
from fastvlm_convert.serve.errors import NotFoundError
from fastvlm_convert.serve.lifecycle import Lifecycle
from fastvlm_convert.serve.metrics import Metrics
from fastvlm_convert.serve.served_bundle import ServedBundle
from fastvlm_convert.serve.settings import Settings


@dataclass(frozen=True)
class BundleService:
    """A bundle, who runs it, and its queue."""

    bundle: ServedBundle
    path: AnswerPath
    answers: Answers


MakeEngine = Callable[[ServedBundle, Settings], Engine]


@dataclass(frozen=True)
class Service:
    """Everything that requests need.

    Attributes:
        settings: The server's.
        bundles: By name, the first is the one that answers where none is named.
        metrics: What is counted.
        cache: Of whole answers, of all bundles; None where caches are off.
        lifecycle: The server's phase.
        started_at: In seconds since 1970.
    """

    settings: Settings
    bundles: Mapping[str, BundleService]
    metrics: Metrics
    cache: AnswerCache | None
    lifecycle: Lifecycle
    started_at: float

    def chosen(self, name: str | None) -> BundleService:
        """The bundle of a request.

        Raises:
            NotFoundError: There is none of that name.
        """
        if name is None:
            return next(iter(self.bundles.values()))
        if name not in self.bundles:
            raise NotFoundError(
                f"there is no model of that name; served: {', '.join(self.bundles)}",
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


def make_service(settings: Settings, bundles: Sequence[ServedBundle], make_engine: MakeEngine) -> Service:
    """A service that has loaded nothing yet."""
    metrics = Metrics(__version__, [bundle.name for bundle in bundles])
    cache = open_answer_cache(settings)

    def one(bundle: ServedBundle) -> BundleService:
        engine = make_engine(bundle, settings)
        admission = Admission(settings.max_queue, lambda: engine.status().slots)
        breaker = Breaker(settings.breaker_failures, settings.breaker_reset_seconds)
        path = AnswerPath(engine, admission, breaker, cache)
        return BundleService(bundle, path, Answers(bundle.name, path, metrics))

    return Service(
        settings, {bundle.name: one(bundle) for bundle in bundles}, metrics, cache, Lifecycle(), time.time()
    )
