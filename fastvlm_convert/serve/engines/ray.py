"""Ray runs the bundle: a Ray Serve deployment, with Ray's router, queue and autoscaling instead of ours.

Every replica holds an engine of its own, usually an embedded one, so that answers are the same. What a
replica cannot know is asked of Ray: who is free, who waits, who is told that there is no room, how many
replicas run.
"""

import asyncio
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from fastvlm_convert.processors import usable_cpus
from fastvlm_convert.serve import errors
from fastvlm_convert.serve.engine import EngineStatus, Piece, Question, Reply, WorkerState
from fastvlm_convert.serve.engines.ray_cluster import Deployed, RaySettings, Stream, deploy
from fastvlm_convert.serve.engines.ray_replica import Asked, Ended, MakeEngine, Message, Started, embedded
from fastvlm_convert.serve.errors import (
    CancelledError,
    DeadlineError,
    EngineFailedError,
    RequestError,
    UnavailableError,
)
from fastvlm_convert.serve.served_bundle import ServedBundle
from fastvlm_convert.serve.settings import Settings

Deploy = Callable[[], Deployed]
"""Runs a bundle on Ray, and blocks meanwhile: `ray_cluster.deploy` with its arguments."""
NO_LIMIT: Final = 2**31 - 1
"""Slots that `status` reports: admission before this engine lets everything pass, as the queue is Ray's."""
_LOOK_S: Final = 0.02  # how often it is seen whether a client left, while nothing else happens
_POLL_S: Final = 2.0  # how often Ray is asked for its replicas
_NEWEST_SHARE: Final = 0.2  # of the newest question in the average cost


@dataclass
class _Replicas:
    """What is known of the replicas: their states from Ray, the rest from their last messages."""

    states: Counter[WorkerState] = field(default_factory=Counter)
    last: dict[str, EngineStatus] = field(default_factory=dict)
    running: Counter[str] = field(default_factory=Counter)
    dead: set[str] = field(default_factory=set)
    deaths: set[str] = field(default_factory=set)

    def heard(self, message: Ended) -> None:
        """A replica says how it is."""
        self.last.pop(message.replica, None)
        self.last[message.replica] = message.status  # at the end: `last` is in the order of the messages

    def died(self, replica: str | None, actor: str) -> None:
        """A replica is gone; it may be told several times."""
        self.deaths.add(actor)
        if replica is not None:
            self.dead.add(replica)

    def status(self, is_ready: bool, waiting: int) -> EngineStatus:
        """All of them together."""
        lookups: Counter[tuple[str, str]] = Counter()
        held: Counter[str] = Counter()
        for status in self.last.values():  # totals only grow, so those of replicas that ended count on
            lookups.update(status.cache_lookups)
        living = [status for name, status in self.last.items() if name not in self.dead]
        living = living[-max(1, self.states["ready"]) :]  # Ray tells how many there are, and not which
        for status in living:
            held.update(status.cache_bytes)
        busy = min(len(+self.running), self.states["ready"])
        workers: Counter[WorkerState] = Counter(self.states)
        workers.update({"busy": busy, "ready": -busy})
        return EngineStatus(
            is_ready=is_ready and self.states["ready"] > 0,
            slots=NO_LIMIT,
            running=self.running.total(),
            workers=dict(+workers),
            restarts=len(self.deaths),
            executed_by=next((status.executed_by for status in living), ""),
            cache_bytes=dict(held),
            cache_lookups=dict(lookups),
            memory_bytes=sum(status.memory_bytes for status in living),
            waiting=waiting,
        )


class RayEngine:
    """Runs a bundle in the replicas of a Ray Serve deployment.

    Args:
        settings: How it is deployed.
        deploy: Deploys it.
        clock: Of the questions' deadlines.
    """

    def __init__(
        self, settings: RaySettings, deploy: Deploy, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._deploy = deploy
        self._clock = clock
        self._deployed: Deployed | None = None
        self._is_stopping = False
        self._waiting = 0
        self._replicas = _Replicas()
        self._poll: asyncio.Task[None] | None = None
        self._look = asyncio.Event()
        self._load_s = 1.0
        self._cost_s = 1.0

    async def start(self) -> None:
        """Deploy the bundle; returns when a replica runs. Starting Ray takes half a minute.

        Raises:
            MissingDependencyError: Ray is not installed.
            UsageError: The cluster has too few processors for the fewest replicas.
            WorkerError: No replica could load the bundle.
        """
        deployed = await asyncio.to_thread(self._deploy)
        _take_signals_back()
        self._load_s = deployed.load_s
        described = await asyncio.to_thread(deployed.describe)
        self._replicas.heard(described)
        self._replicas.states = await asyncio.to_thread(deployed.states)
        self._poll = asyncio.create_task(self._keep_looking(deployed))
        self._deployed = deployed

    async def stop(self) -> None:
        """End at once; what is still running gets `UnavailableError` (`draining`)."""
        self._is_stopping = True
        if self._poll is not None:
            self._poll.cancel()
        if self._deployed is not None:
            await asyncio.sleep(2 * _LOOK_S)  # for the questions to cancel their calls
            await asyncio.to_thread(self._deployed.take_down)

    async def answer(self, question: Question) -> AsyncIterator[Piece | Reply]:
        """Run a question; see `Engine.answer`. It may wait in Ray's queue, which has a limit of its own.

        Raises:
            EngineFailedError: The runtime raised an error.
            UnavailableError: The queue is full (`queue_full`), the replica died (`worker_died`), the bundle
                is not there yet (`loading`) or no more (`draining`).
            DeadlineError: The deadline passed.
            CancelledError: `question.cancelled` was set.
        """
        if self._is_stopping:
            raise _stops()
        if self._deployed is None:
            retry = _whole(self._load_s)
            raise UnavailableError("the bundle is being loaded", code="loading", retry_after_s=retry)
        came = began = self._clock()
        asked = Asked(
            question.request_id,
            question.prompt,
            question.image_keys,
            question.sampling,
            question.deadline - came,
            question.wants_logprob,
            question.scope,
        )
        async with aclosing(self._messages(self._deployed.answer(asked), question)) as messages:
            async for message in messages:
                if isinstance(message, Started):
                    began = self._clock()
                elif isinstance(message, Reply):
                    self._cost_s += _NEWEST_SHARE * (self._clock() - began - self._cost_s)
                    yield replace(message, timings=replace(message.timings, queue_ms=1000 * (began - came)))
                elif isinstance(message, Piece):
                    yield message

    async def _messages(self, stream: Stream, question: Question) -> AsyncGenerator[Message, None]:
        """Everything that a replica says about a question.

        Raises:
            RequestError: The question is not answered.
        """
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        replica: str | None = None
        has_ended = False
        self._waiting += 1
        try:
            while not has_ended:
                message = await self._next(stream, question)
                if isinstance(message, Started):
                    replica = message.replica
                    self._waiting -= 1
                    self._replicas.running[replica] += 1
                elif isinstance(message, Ended):
                    has_ended = True
                    self._replicas.heard(message)
                    if message.error is not None:
                        name, fields = message.error
                        raise getattr(errors, name)(**fields)
                yield message
        except (RayError, RayServeException) as error:
            has_ended = True
            raise self._told(error, replica) from error
        finally:
            if replica is None:
                self._waiting -= 1
            else:
                self._replicas.running[replica] -= 1
            if not has_ended:
                stream.cancel()

    async def _next(self, stream: Stream, question: Question) -> Message:
        """The next message, unless nobody waits for it any longer.

        Raises:
            CancelledError: The client left.
            DeadlineError: The deadline passed.
            UnavailableError: The engine stops.
        """
        coming = asyncio.ensure_future(anext(stream))
        coming.add_done_callback(_retrieved)
        try:
            while not coming.done():
                if question.cancelled.is_set():
                    raise CancelledError("the client left before the answer was whole", code="cancelled")
                if self._is_stopping:
                    raise _stops()
                left = question.deadline - self._clock()
                if left <= 0:
                    raise _late()
                await asyncio.wait([coming], timeout=min(_LOOK_S, left))
            message: Message = coming.result()
            return message
        finally:
            coming.cancel()

    def _told(self, error: Exception, replica: str | None) -> RequestError:
        """Ray's errors in the words of the contract.

        Args:
            error: Ray's.
            replica: Where the question ran; None if that is not known.
        """
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError

        if isinstance(error, BackPressureError):
            return UnavailableError(
                f"{self._settings.max_queue} requests wait already, and no more may",
                code="queue_full",
                retry_after_s=_whole(self._next_free_s()),
            )
        if isinstance(error, RayActorError):
            self._replicas.died(replica, str(error.actor_id))
            self._look.set()
            return UnavailableError(
                "the process that ran the question died, and another is being started",
                code="worker_died",
                retry_after_s=_whole(self._load_s),
            )
        if self._is_stopping:
            return _stops()
        return EngineFailedError("the bundle's runtime raised an error", code="engine_failed")

    def _next_free_s(self) -> float:
        """When a place in the queue is free: one question's time, shared by all slots that run now."""
        return self._cost_s / max(1, self._settings.slots * self._replicas.states["ready"])

    async def _keep_looking(self, deployed: Deployed) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self._look.wait()
            self._look.clear()
            self._replicas.states = await asyncio.to_thread(deployed.states)

    def status(self) -> EngineStatus:
        """How it is now; replicas as they were at most some seconds ago."""
        return self._replicas.status(not self._is_stopping, self._waiting)


def make_ray_engine(bundle: ServedBundle, settings: Settings) -> RayEngine:
    """The engine of a bundle by the server's settings, not started yet.

    Raises:
        UsageError: The queue holds nothing.
    """
    make, deployed = ray_deployment(bundle, settings)
    return RayEngine(deployed, partial(deploy, make, deployed))


def ray_deployment(
    bundle: ServedBundle, settings: Settings, deployment: str = "bundle"
) -> tuple[MakeEngine, RaySettings]:
    """What a replica of a bundle runs, and how it is deployed.

    Args:
        bundle: The bundle.
        settings: The server's.
        deployment: Ray's name for it.

    Raises:
        UsageError: The queue holds nothing.
    """
    threads = settings.threads
    if threads is None:
        threads = max(1, len(usable_cpus()) // (settings.slots * settings.max_workers))
    deployed = RaySettings(
        name=bundle.name,
        slots=settings.slots,
        cpus=settings.slots * threads,
        min_replicas=settings.min_workers,
        max_replicas=settings.max_workers,
        max_queue=settings.max_queue,
        deployment=deployment,
    )
    own = settings.model_copy(update={"threads": threads})
    return partial(embedded, bundle.path.resolve(), bundle.name, bundle.target, own), deployed


def _take_signals_back() -> None:
    """Put Python's signal handlers in front of Ray's again.

    Ray's library installs handlers that call those of Python, but also set an alarm that aborts the process
    three seconds after SIGTERM, however much is still to be drained.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # only there has Python any
    for number in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(number)
        if callable(handler):
            signal.signal(number, handler)


def _retrieved(task: "asyncio.Future[Message]") -> None:
    """Nobody asks a cancelled call how it ended, and asyncio would complain about that."""
    if not task.cancelled():
        task.exception()


def _late() -> DeadlineError:
    return DeadlineError("the answer was not there in time; ask for fewer tokens", code="deadline")


def _stops() -> UnavailableError:
    return UnavailableError("the server is shutting down", code="draining", retry_after_s=5.0)


def _whole(seconds: float) -> float:
    """Retry-After has whole seconds."""
    return float(max(1, math.ceil(seconds)))
