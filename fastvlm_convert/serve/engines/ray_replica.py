"""What runs inside Ray: a replica with one engine, and the messages that it sends about a question."""

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from fastvlm_convert.prompt import Prompt
from fastvlm_convert.serve.engine import Engine, EngineStatus, Piece, Question, Reply, Sampling
from fastvlm_convert.serve.engines.embedded import EmbeddedEngine
from fastvlm_convert.serve.errors import RequestError
from fastvlm_convert.serve.prompt_caches import open_prompt_caches
from fastvlm_convert.serve.served_bundle import ServedBundle, open_served_bundle
from fastvlm_convert.serve.settings import Settings
from fastvlm_convert.targets import Target

MakeEngine = Callable[[], Engine]
"""Makes the engine of a replica, there; a function of a module, or a `functools.partial` of one."""


@dataclass(frozen=True)
class Asked:
    """A question on its way to a replica: without what belongs to this process, its clock for one."""

    request_id: str
    prompt: Prompt
    image_keys: tuple[str, ...]
    sampling: Sampling
    seconds: float
    wants_logprob: bool
    scope: str


@dataclass(frozen=True)
class Started:
    """The first message of a replica: the question runs. Until then it waits in Ray's queue."""

    replica: str


@dataclass(frozen=True)
class Ended:
    """The last message: what became of the question, and how the replica is.

    An error travels as its class's name and fields: of an exception, Ray would send a copy of another class.
    """

    replica: str
    status: EngineStatus
    error: tuple[str, dict[str, Any]] | None = None


Message = Started | Piece | Reply | Ended


class ReplicaEngine(EmbeddedEngine):
    """An embedded engine with caches of its own, as nothing is shared between replicas.

    Args:
        bundle: The bundle.
        settings: The server's; threads are set.
    """

    def __init__(self, bundle: ServedBundle, settings: Settings) -> None:
        self._caches = open_prompt_caches(settings)
        model = f"{bundle.sha256} {bundle.target}"
        cache = None if self._caches is None else self._caches.of_model(model)
        super().__init__(bundle, settings.slots, settings.threads, cache)

    def status(self) -> EngineStatus:
        """How it is now, its caches included."""
        status = super().status()
        if self._caches is None:
            return status
        return replace(status, cache_bytes=self._caches.bytes, cache_lookups=self._caches.lookups)


def embedded(path: Path, name: str, target: Target, settings: Settings) -> Engine:
    """The engine of a replica that runs a bundle in its own process.

    Raises:
        BundleError: It is not where it is on the server's machine, or damaged.
    """
    return ReplicaEngine(open_served_bundle(path, name, target), settings)


class Replica:
    """What Ray runs: one engine, asked through a stream of messages."""

    def __init__(self, make_engine: MakeEngine) -> None:
        from ray import serve

        self._engine = make_engine()
        self._name: str = serve.get_replica_context().replica_id.unique_id

    async def reconfigure(self, _: dict[str, Any]) -> None:
        """Load the bundle; Ray waits for it before it counts the replica as running."""
        if not self._engine.status().is_ready:
            await self._engine.start()

    async def describe(self) -> Ended:
        """How the replica is."""
        return self._ended()

    async def answer(self, asked: Asked) -> AsyncIterator[Message]:
        """Run a question. Ray cancels the generator where the caller cancels."""
        yield Started(self._name)
        question = Question(
            request_id=asked.request_id,
            prompt=asked.prompt,
            image_keys=asked.image_keys,
            sampling=asked.sampling,
            deadline=time.monotonic() + asked.seconds,
            wants_logprob=asked.wants_logprob,
            scope=asked.scope,
        )
        try:
            async for item in self._engine.answer(question):
                yield item
        except RequestError as error:
            yield self._ended((type(error).__name__, asdict(error)))
        else:
            yield self._ended()
        finally:
            question.cancelled.set()  # wherever Ray's cancelling has hit

    def _ended(self, error: tuple[str, dict[str, Any]] | None = None) -> Ended:
        status = self._engine.status()
        if not status.memory_bytes:
            status = replace(status, memory_bytes=psutil.Process().memory_info().rss)
        return Ended(self._name, status, error)
