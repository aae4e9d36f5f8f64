"""Who runs now, who waits, and who is told at once that waiting is of no use."""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from fastvlm_convert.serve.errors import UnavailableError

_NEWEST_SHARE: Final = 0.2  # of the newest question in the average cost
_SOONEST_RETRY_S: Final = 1.0  # Retry-After has whole seconds


@dataclass(frozen=True)
class _Waiter:
    """A request in the queue; its turn is a future that gets a result when a slot is its own."""

    turn: asyncio.Future[None]


class Admission:
    """A bounded queue before a fixed number of slots: first come, first served.

    All of it runs in one event loop. What a question costs is the average time that a slot was taken by one,
    the newest counting most; before the first has ended nothing is known, and nobody is refused for it.

    Args:
        max_queue: Most requests that wait; 0 lets none wait.
        slots: How many questions may run at once, now.
        clock: Seconds that only go forward.
    """

    def __init__(
        self, max_queue: int, slots: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_queue = max_queue
        self._slots = slots
        self._clock = clock
        self._queue: deque[_Waiter] = deque()
        self._running = 0
        self._cost_s: float | None = None

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Slots that are taken."""
        return self._running

    @property
    def average_cost_s(self) -> float | None:
        """Seconds that a question takes a slot; None until one has ended."""
        return self._cost_s

    def expected_wait_s(self) -> float:
        """How long a request that came now would wait for a slot; 0 where one is free or nothing is known."""
        if self._has_room() or self._cost_s is None:
            return 0.0
        return self._cost_s * (len(self._queue) + 1) / max(1, self._slots())

    @asynccontextmanager
    async def slot(self, deadline: float) -> AsyncIterator[float]:
        """Wait for a slot and hold it; gives the seconds waited.

        Cancelling the task that waits takes it out of the queue.

        Args:
            deadline: Of the request, on the same clock.

        Raises:
            UnavailableError: The queue is full (`queue_full`), or the answer would come after the deadline
                (`expected_wait`).
        """
        came = self._clock()
        await self._turn(deadline)
        began = self._clock()
        ended = False
        try:
            yield began - came
            ended = True
        finally:
            self._running -= 1
            if ended:
                self._learn(self._clock() - began)
            self.dispatch()

    def dispatch(self) -> None:
        """Give free slots to those that wait; to be called when there may be more slots than before."""
        while self._queue and self._running < self._slots():
            waiter = self._queue.popleft()
            if not waiter.turn.done():
                self._running += 1
                waiter.turn.set_result(None)

    async def _turn(self, deadline: float) -> None:
        """Returns when a slot is the caller's."""
        if self._has_room():
            self._running += 1
            return
        self._refuse_what_cannot_be(deadline)
        waiter = _Waiter(asyncio.get_running_loop().create_future())
        self._queue.append(waiter)
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter in self._queue:
                self._queue.remove(waiter)
            elif waiter.turn.done() and not waiter.turn.cancelled():  # its turn came in the same moment
                self._running -= 1
                self.dispatch()
            raise

    def _has_room(self) -> bool:
        return not self._queue and self._running < self._slots()

    def _refuse_what_cannot_be(self, deadline: float) -> None:
        each_s = (self._cost_s or 0.0) / max(1, self._slots())
        if len(self._queue) >= self.max_queue:
            raise UnavailableError(
                f"{len(self._queue)} requests wait already, and no more than {self.max_queue} may",
                code="queue_full",
                retry_after_s=_whole_seconds(each_s),
            )
        if self._cost_s is None:
            return
        wait_s, left_s = self.expected_wait_s(), deadline - self._clock()
        late_s = wait_s + self._cost_s - left_s
        if late_s > 0:
            raise UnavailableError(
                f"an answer is expected in {wait_s + self._cost_s:.1f} s, and the request has {left_s:.1f} s",
                code="expected_wait",
                # A later request has more time than this one has left; the queue must shorten by the excess,
                # and one that has no time at all for its own cost needs a free slot.
                retry_after_s=_whole_seconds(min(late_s, wait_s)),
            )

    def _learn(self, seconds: float) -> None:
        if self._cost_s is None:
            self._cost_s = seconds
        else:
            self._cost_s += _NEWEST_SHARE * (seconds - self._cost_s)


def _whole_seconds(seconds: float) -> float:
    return float(max(_SOONEST_RETRY_S, math.ceil(seconds)))
