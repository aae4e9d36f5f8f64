"""The way of a question: cached answers, equal questions in flight, breaker, queue, engine, in that order."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Final

from fastvlm_convert import __version__
from fastvlm_convert.serve.admission import Admission
from fastvlm_convert.serve.breaker import Breaker
from fastvlm_convert.serve.caches import AnswerCache, cache_key
from fastvlm_convert.serve.engine import Engine, Piece, Question, Reply, StageTimings
from fastvlm_convert.serve.errors import (
    CancelledError,
    DeadlineError,
    EngineFailedError,
    RequestError,
    UnavailableError,
)
from fastvlm_convert.serve.metrics import Metrics
from fastvlm_convert.serve.traffic import Traffic

_LOG: Final = logging.getLogger(__name__)
_AGAIN_S: Final = 5.0  # until another server may have taken this one's place

Prepare = Callable[[threading.Event], Awaitable[Question]]
"""Decodes the pictures and builds the prompt; the event is the question's `cancelled`."""


@dataclass(frozen=True)
class Asked:
    """A request that is ready to be answered, but for its pictures, which are decoded only if they must be.

    Attributes:
        request_id: Whose first question it is, for the log.
        key: Equal for requests with equal answers; None where chance decides the answer.
        prepare: Makes the question of it.
        deadline: `time.monotonic()` after which its client does not wait.
    """

    request_id: str
    key: str | None
    prepare: Prepare
    deadline: float


@dataclass(frozen=True)
class AnswerPath:
    """What a question passes, in the reverse order.

    Attributes:
        engine: Runs the bundle.
        admission: Its queue.
        breaker: Its circuit breaker.
        cache: Of whole answers, or None.
        traffic: What passes, for the number of workers.
    """

    engine: Engine
    admission: Admission
    breaker: Breaker
    cache: AnswerCache | None
    traffic: Traffic = field(default_factory=Traffic)


class Answers:
    """Answers the questions of one bundle.

    Args:
        model: The bundle's name, for the metrics.
        path: Who runs it, its queue, its breaker and the cache of whole answers.
        metrics: Counts what happens.
        clock: Seconds that only go forward, those of the deadlines.
    """

    def __init__(
        self,
        model: str,
        path: AnswerPath,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._path = path
        self._metrics = metrics
        self._clock = clock
        self._flights: dict[str, _Flight] = {}
        self._flying: dict[asyncio.Task[None], _Flight] = {}

    async def ask(self, asked: Asked) -> AsyncGenerator[Piece | Reply, None]:
        """Pieces of text as they come, a `Reply` last.

        Whoever stops listening must close the iterator: the question ends when the last has.

        Raises:
            RequestError: The question is not answered; what the engine, the queue or the breaker says.
            DeadlineError: The deadline passed.
        """
        cached = await self._cached(asked.key)
        if cached is not None:
            if cached.text:
                yield Piece(cached.text, cached.answer_tokens, "hit")
            yield cached
            return
        flight = self._flights.get(asked.key) if asked.key is not None else None
        is_leader = flight is None
        if flight is None:
            flight = self._start(asked)
        else:
            self._metrics.deduplicated()
        flight.members += 1
        try:
            async for item in flight.items_until(asked.deadline, self._clock):
                yield item if is_leader else _of_a_follower(item)
        finally:
            self._leave(flight)

    def stop(self) -> None:
        """End everything that is not answered yet; those who wait hear that the server shuts down."""
        for flight in self._flying.values():
            flight.end(
                UnavailableError("the server is shutting down", code="draining", retry_after_s=_AGAIN_S)
            )
            self._cancel(flight)

    async def _cached(self, key: str | None) -> Reply | None:
        if key is None or self._path.cache is None:
            return None
        reply = await self._path.cache.get(self._kept_as(key))
        self._metrics.cache_lookup("answer", "miss" if reply is None else "hit")
        if reply is None:
            return None
        return replace(reply, cache="hit", cached_tokens=reply.prompt_tokens, timings=StageTimings())

    def _kept_as(self, key: str) -> str:
        """The key of an answer in a cache that outlives the server: another version can answer otherwise."""
        return cache_key(key, __version__, self._path.engine.status().executed_by)

    def _start(self, asked: Asked) -> "_Flight":
        flight = _Flight(asked)
        if asked.key is not None:
            self._flights[asked.key] = flight
        task = asyncio.get_running_loop().create_task(self._fly(flight))
        self._flying[task] = flight
        task.add_done_callback(lambda done: self._land(flight, done))
        return flight

    async def _fly(self, flight: "_Flight") -> None:
        """Run a flight's question; its errors are told to its members by `_land`.

        Raises:
            RequestError: The question is not answered.
        """
        asked, path = flight.asked, self._path
        path.traffic.came()
        path.breaker.check()
        back_in_s = path.engine.status().back_in_s
        if back_in_s is not None:
            raise UnavailableError(
                "what runs the bundle has died, and does not start again; the server's log says why",
                code="loading",
                retry_after_s=back_in_s,
            )
        # Only now can it be the trial, and what waited while the breaker opened goes no further.
        async with path.admission.slot(asked.deadline) as waited_s, path.breaker.guard():
            self._metrics.queued(self._model, waited_s)
            flight.is_running = True
            began = self._clock()
            question = await asked.prepare(flight.cancelled)
            async for item in path.engine.answer(question):
                if isinstance(item, Reply):
                    queue_ms = waited_s * 1000 + item.timings.queue_ms  # of the engine's own queue, too
                    item = replace(item, timings=replace(item.timings, queue_ms=queue_ms))
                    if asked.key is not None and path.cache is not None:
                        await path.cache.put(self._kept_as(asked.key), item)
                flight.add(item)
            path.traffic.answered(waited_s, self._clock() - began)

    def _land(self, flight: "_Flight", task: asyncio.Task[None]) -> None:
        """Tell the members how a flight ended. Any error that is not meant for clients is a bug of ours."""
        del self._flying[task]
        self._forget(flight)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, RequestError):
            if isinstance(error, EngineFailedError):
                _LOG.error("request %s: %s", flight.asked.request_id, error, exc_info=error.__cause__)
            flight.end(error)
        elif error is not None:
            _LOG.error("request %s: a bug in the server", flight.asked.request_id, exc_info=error)
            flight.end(EngineFailedError("the server made a mistake; its log has it", code="internal"))
        elif task.cancelled() or not flight.has_reply:
            flight.end(CancelledError("nobody waits for the answer", code="cancelled"))

    def _leave(self, flight: "_Flight") -> None:
        """One member less; the last ends the flight."""
        flight.members -= 1
        if flight.members or flight.has_ended:
            return
        self._forget(flight)  # whoever comes now starts anew
        self._cancel(flight)

    def _cancel(self, flight: "_Flight") -> None:
        """Let a question end: at once in the queue, within a token in the engine."""
        flight.cancelled.set()
        if not flight.is_running:
            for task in [task for task, flown in self._flying.items() if flown is flight]:
                task.cancel()

    def _forget(self, flight: "_Flight") -> None:
        key = flight.asked.key
        if key is not None and self._flights.get(key) is flight:
            del self._flights[key]


class _Flight:
    """A question on its way, and what has come of it so far, for all that asked it."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.cancelled = threading.Event()
        self.members = 0
        self.is_running = False
        self._items: list[Piece | Reply] = []
        self._error: RequestError | None = None
        self._news = asyncio.Event()

    @property
    def has_reply(self) -> bool:
        """Whether the answer is whole."""
        return bool(self._items) and isinstance(self._items[-1], Reply)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes."""
        return self.has_reply or self._error is not None

    def add(self, item: Piece | Reply) -> None:
        """Some more of the answer."""
        self._items.append(item)
        self._tell()

    def end(self, error: RequestError) -> None:
        """There is no more, unless the answer was whole."""
        if not self.has_ended:
            self._error = error
            self._tell()

    async def items_until(self, deadline: float, clock: Callable[[], float]) -> AsyncIterator[Piece | Reply]:
        """Everything from the beginning, as it comes.

        Raises:
            RequestError: The question is not answered; to each member an error of its own.
            DeadlineError: The member's deadline passed.
        """
        told = 0
        while True:
            while told < len(self._items):
                told += 1
                yield self._items[told - 1]
            if self.has_reply:
                return
            if self._error is not None:
                raise replace(self._error) from self._error.__cause__
            news = self._news
            try:
                async with asyncio.timeout(max(0.0, deadline - clock())):
                    await news.wait()
            except TimeoutError:
                raise DeadlineError(
                    "the answer was not there in time; ask for fewer tokens, or try again when there is "
                    "less to do",
                    code="deadline",
                ) from None

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _of_a_follower(item: Piece | Reply) -> Piece | Reply:
    """What a request gets that was answered along with an equal one."""
    return replace(item, cache="hit")
