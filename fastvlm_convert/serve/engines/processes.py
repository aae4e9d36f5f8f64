"""The engine whose workers are child processes: one that dies takes one question with it, not the server."""

import asyncio
import contextlib
import hashlib
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from fastvlm_convert.errors import ConversionError
from fastvlm_convert.processors import usable_cpus
from fastvlm_convert.serve.engine import EngineStatus, Piece, Question, Reply, WorkerState
from fastvlm_convert.serve.engines.worker import Launch, Worker, check_waiting, draining, ending
from fastvlm_convert.serve.engines.worker_memory import available_bytes, check_memory, worker_bytes
from fastvlm_convert.serve.engines.worker_messages import NO_CACHES, Load
from fastvlm_convert.serve.errors import UnavailableError
from fastvlm_convert.serve.served_bundle import ServedBundle, check_unchanged

COMMAND: Final = (sys.executable, "-m", "fastvlm_convert.serve.engines.worker_process")

_LOG: Final = logging.getLogger(__name__)
_POLL_S: Final = 0.05  # how often a question that waits for a worker is looked at
_FIRST_DELAY_S: Final = 0.5
_LONGEST_DELAY_S: Final = 30.0
_HEALTHY_S: Final = 60.0


class Backoff:
    """How long to wait before a worker is started again: 0.5 s, doubling to 30."""

    def __init__(self) -> None:
        self._next_s = _FIRST_DELAY_S

    def delay_s(self, lived_s: float) -> float:
        """Seconds until the next start, after a life; a minute of it is health, and starts anew."""
        if lived_s >= _HEALTHY_S:
            self._next_s = _FIRST_DELAY_S
        delay, self._next_s = self._next_s, min(_LONGEST_DELAY_S, 2 * self._next_s)
        return delay


@dataclass(frozen=True)
class Workers:
    """How many workers there are, and what each has.

    Attributes:
        min_workers: How many are started.
        max_workers: How many there may be; memory for all of them must be free.
        threads: That compute one operation; None leaves it to the runtime.
        feature_cache_bytes: Most bytes of image features, all workers together.
        prefix_cache_bytes: Most bytes of prompts' keys and values, all workers together.
        command: What starts one.
        start_s: Longest time from the start of one until it is ready.
        hang_s: How long one may go on with a question that nobody waits for until it is killed.
    """

    min_workers: int = 1
    max_workers: int = 1
    threads: int | None = None
    feature_cache_bytes: int = 128_000_000
    prefix_cache_bytes: int = 256_000_000
    command: tuple[str, ...] = COMMAND
    start_s: float = 300.0
    hang_s: float = 30.0


class _Place:
    """One of the places for workers: who works there now, and when the next one comes.

    Attributes:
        number: The place's.
        state: What goes on there while nobody is ready.
        worker: The process.
        due: When a worker is expected to be ready again, on `time.monotonic()`.
        start_s: How long the last start took.
        is_leaving: Whether the place is given up once its worker is idle.
        is_failing: Whether its worker died and another one did not start.
    """

    def __init__(self, number: int, worker: Worker) -> None:
        self.number = number
        self.worker = worker
        self.state: WorkerState = "starting"
        self.due = 0.0
        self.start_s = 1.0
        self.is_leaving = False
        self.is_failing = False
        self.backoff = Backoff()
        self.task: asyncio.Task[None] | None = None

    @property
    def shown_state(self) -> WorkerState:
        """What `EngineStatus.workers` counts it as."""
        if self.is_leaving:
            return "stopping"
        if self.state == "ready" and self.worker.is_busy:
            return "busy"
        return self.state

    @property
    def has_slot(self) -> bool:
        """Whether it can run a question, or runs one that somebody waits for."""
        return (self.worker.is_idle and not self.is_leaving) or self.worker.is_waited_for


class ProcessesEngine:
    """Runs a bundle in child processes, each with one question at a time and with caches of its own.

    Args:
        bundle: The bundle.
        workers: How many there are, and what each has.
    """

    def __init__(self, bundle: ServedBundle, workers: Workers) -> None:
        self._workers = workers
        self._bundle = bundle
        share = workers.max_workers  # the caches hold what is configured, however many workers there are
        self._load = Load(
            bundle=str(bundle.path),
            target=bundle.target,
            threads=workers.threads,
            feature_cache_bytes=workers.feature_cache_bytes // share,
            prefix_cache_bytes=workers.prefix_cache_bytes // share,
        )
        self._launch = Launch(workers.command, self._load, workers.start_s, workers.hang_s)
        self._places: dict[int, _Place] = {}
        self._change = asyncio.Event()
        self._turns: deque[object] = deque()  # of questions that wait for a worker
        self._on_slots: Callable[[], object] = lambda: None
        self._running = 0
        self._restarts = 0
        self._executed_by = ""
        self._is_stopping = False
        self._past_lookups: dict[tuple[str, str], int] = {}
        self.worker_bytes = 0

    async def start(self) -> None:
        """Start the workers; returns when all can answer.

        Raises:
            SettingsError: Memory does not hold as many as may be asked for.
            ConversionError: A worker cannot load the bundle, or ends before it is ready.
        """
        cache_bytes = self._load.feature_cache_bytes + self._load.prefix_cache_bytes
        self.worker_bytes = await asyncio.to_thread(worker_bytes, self._bundle, cache_bytes)
        check_memory(self._workers.max_workers, self.worker_bytes, available_bytes())
        places = [self._new_place() for _ in range(self._workers.min_workers)]
        results = await asyncio.gather(*map(self._start_at, places), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                await self.stop()
                raise result
        for place in places:
            self._keep(place)

    def _new_place(self) -> _Place:
        number = next(n for n in range(len(self._places) + 1) if n not in self._places)
        place = self._places[number] = _Place(number, Worker(number, self._launch, self._wake))
        return place

    async def _start_at(self, place: _Place) -> None:
        began = time.monotonic()
        await place.worker.start()
        place.start_s = time.monotonic() - began
        place.state = "ready"
        place.is_failing = False
        self._executed_by = place.worker.executed_by
        self._wake()

    def _keep(self, place: _Place) -> None:
        place.task = asyncio.create_task(self._supervise(place))

    async def _supervise(self, place: _Place) -> None:
        """Start a worker again whenever it ended, until it is to end."""
        while True:
            ready_at = time.monotonic()
            code = await place.worker.ended()
            if self._is_stopping or place.is_leaving:
                return
            _LOG.error("worker %d ended with %s; it is started again", place.number, ending(code))
            lived_s = time.monotonic() - ready_at
            while not await self._restart(place, lived_s):
                lived_s = 0.0

    async def _restart(self, place: _Place, lived_s: float) -> bool:
        """Whether a worker that ended after some time is there again."""
        self._remember_lookups(place.worker)
        delay = place.backoff.delay_s(lived_s)
        place.state = "restarting"
        place.due = time.monotonic() + delay + place.start_s
        self._wake()
        await asyncio.sleep(delay)
        place.worker = Worker(place.number, self._launch, self._wake)
        self._restarts += 1
        try:
            await asyncio.to_thread(check_unchanged, self._bundle)
            await self._start_at(place)
        except ConversionError as error:
            _LOG.error("worker %d does not start: %s", place.number, error)
            place.is_failing = True
            return False
        return True

    async def stop(self) -> None:
        """End at once; what is still running gets `UnavailableError` (`draining`)."""
        self._is_stopping = True
        self._wake()
        places = list(self._places.values())
        for place in places:
            if place.task is not None:
                place.task.cancel()
        await asyncio.gather(*(place.worker.close() for place in places))

    async def scale_to(self, workers: int) -> None:
        """Have another number of workers; returns when they are there, and those too many are gone.

        One that runs a question finishes it before it ends.

        Args:
            workers: How many; within `min_workers` and `max_workers`.

        Raises:
            ConversionError: A new worker does not start; there are as many as before.
        """
        staying = [place for place in self._places.values() if not place.is_leaving]
        # Idle ones first, as they hold nobody up.
        leaving = sorted(staying, key=lambda place: (not place.worker.is_busy, place.number))[workers:]
        for place in leaving:
            place.is_leaving = True
        await asyncio.gather(*map(self._retire, leaving))
        for _ in range(workers - len(staying)):
            await self._add()

    async def _add(self) -> None:
        place = self._new_place()
        try:
            await asyncio.to_thread(check_unchanged, self._bundle)
            await self._start_at(place)
        except ConversionError:
            del self._places[place.number]
            raise
        self._keep(place)

    async def _retire(self, place: _Place) -> None:
        while place.worker.is_busy:
            await self._changed()
        if place.task is not None:
            place.task.cancel()
        await place.worker.close()
        self._remember_lookups(place.worker)
        del self._places[place.number]

    async def answer(self, question: Question) -> AsyncGenerator[Piece | Reply, None]:
        """Run a question; see `Engine.answer`.

        Raises:
            EngineFailedError: The runtime raised an error.
            UnavailableError: The worker died (`worker_died`), none will be there in time (`loading`), or the
                engine stops (`draining`).
            DeadlineError: The deadline passed.
            CancelledError: `question.cancelled` was set.
        """
        worker = await self._idle_worker(question)
        self._running += 1
        try:
            async with aclosing(worker.answer(question)) as items:
                async for item in items:
                    yield item
        except UnavailableError as error:
            if error.code == "worker_died":
                error.retry_after_s = self._retry_after_s()
            raise
        finally:
            self._running -= 1

    async def _idle_worker(self, question: Question) -> Worker:
        """The worker for a question, once one is idle; first come, first served."""
        turn = object()
        self._turns.append(turn)
        try:
            while True:
                check_waiting(question)
                if self._is_stopping:
                    raise draining()
                idle = [p for p in self._places.values() if p.worker.is_idle and not p.is_leaving]
                if idle and self._turns[0] is turn:
                    return max(idle, key=lambda place: _score(question, place.number)).worker
                self._check_comes_back(question)
                await self._changed()
        finally:
            self._turns.remove(turn)
            self._change.set()

    def _check_comes_back(self, question: Question) -> None:
        """See that a worker is there, or will be before the deadline.

        Raises:
            UnavailableError: All have ended, and none is started again in time (`loading`).
        """
        places = self._places.values()
        if all(place.state == "restarting" and place.due > question.deadline for place in places):
            raise UnavailableError(
                "the processes that run the bundle have died and are not there again in time",
                code="loading",
                retry_after_s=self._retry_after_s(),
            )

    def _retry_after_s(self) -> float:
        """When a worker is there again."""
        if any(place.state == "ready" for place in self._places.values()):
            return 1.0
        due = min((place.due for place in self._places.values()), default=0.0)
        return max(1.0, due - time.monotonic())

    def watch_slots(self, on_change: Callable[[], object]) -> None:
        """Call something whenever there may be more slots than before."""
        self._on_slots = on_change

    def _wake(self) -> None:
        self._change.set()
        self._on_slots()

    async def _changed(self) -> None:
        """Wait until a worker became idle or ended, or a moment."""
        self._change.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S):
                await self._change.wait()

    def _remember_lookups(self, worker: Worker) -> None:
        """Counts go on when a worker's process is another."""
        for key, count in worker.caches.lookups.items():
            self._past_lookups[key] = self._past_lookups.get(key, 0) + count
        worker.caches = NO_CACHES

    def status(self) -> EngineStatus:
        """How it is now."""
        places = list(self._places.values())
        states: dict[WorkerState, int] = {}
        held: dict[str, int] = {}
        lookups = dict(self._past_lookups)
        for place in places:
            states[place.shown_state] = states.get(place.shown_state, 0) + 1
            for cache, size in place.worker.caches.bytes_held.items():
                held[cache] = held.get(cache, 0) + size
            for key, count in place.worker.caches.lookups.items():
                lookups[key] = lookups.get(key, 0) + count
        slots = sum(place.has_slot for place in places)
        return EngineStatus(
            is_ready=slots > 0 and not self._is_stopping,
            slots=slots,
            running=self._running,
            workers=states,
            restarts=self._restarts,
            executed_by=self._executed_by,
            cache_bytes=held,
            cache_lookups=lookups,
            memory_bytes=sum(place.worker.memory_bytes for place in places),
            back_in_s=self._retry_after_s() if places and all(p.is_failing for p in places) else None,
        )

    @property
    def num_workers(self) -> int:
        """Workers that there are to stay."""
        return sum(not place.is_leaving for place in self._places.values())

    @property
    def cores_per_worker(self) -> int:
        """Cores that a worker keeps busy while it runs a question."""
        return self._load.threads or len(usable_cpus())

    @property
    def cpu_s(self) -> float:
        """Processor time of the workers that live, in seconds."""
        return sum(place.worker.cpu_s for place in self._places.values())


def _score(question: Question, number: int) -> bytes:
    """Rendezvous hashing: a picture's questions go to the worker with the highest score that is idle."""
    key = ",".join(question.image_keys)
    return hashlib.sha256(f"{key}/{number}".encode()).digest()
