"""A circuit breaker: a bundle whose runtime keeps failing gets no questions for a while, then exactly one.

Our own, and neither `circuitbreaker` 2.1 nor `purgatory` 3.0: in both, an error that does not count (a client
that left, a deadline) ends like a success, so it clears the failures and closes a breaker that is half open;
both let every question through then; their pause never grows, and tests cannot set their clock. A guard
around them would have to keep all of that state once more.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, Literal

from fastvlm_convert.serve.errors import EngineFailedError, UnavailableError

BreakerState = Literal["closed", "open", "half_open"]

MAX_FACTOR: Final = 16  # 10 s become 20, 40, 80, 160
_TRIAL_S: Final = 1.0  # when to ask again while a trial runs; how long it takes is not known


class Breaker:
    """The breaker of one bundle. Called from the server's event loop alone.

    Closed: everything passes; as many failures in a row as allowed open it. Open: nothing passes until
    the pause is over. Half open: one question passes, the trial. Its success closes the breaker; its failure
    opens it for twice as long; if it ends without either, the next question is the trial.

    Args:
        failures: Runtime errors in a row that open it.
        reset_s: Seconds of the first pause; each further one is twice as long, up to sixteen times this.
        clock: Seconds that only go forward.
    """

    def __init__(
        self, failures: int = 5, reset_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_failures = failures
        self._reset_s = reset_s
        self._clock = clock
        self._failures = 0
        self._pause_s = reset_s
        self._open_until: float | None = None  # None: closed
        self._trial: Pass | None = None
        self._era = 0  # counts up with every change: what began in an earlier one no longer matters

    @property
    def state(self) -> BreakerState:
        """How it is now."""
        if self._open_until is None:
            return "closed"
        return "open" if self._clock() < self._open_until else "half_open"

    def check(self) -> None:
        """See whether a question would pass now, before it waits for its turn.

        Raises:
            UnavailableError: Nothing passes now (`breaker_open`).
        """
        if self._open_until is None:
            return
        left_s = self._open_until - self._clock()
        if left_s > 0 or self._trial is not None:
            raise UnavailableError(
                "the bundle's runtime keeps failing, so it is left alone for a while; try again later",
                code="breaker_open",
                retry_after_s=left_s if left_s > 0 else _TRIAL_S,
            )

    def before(self) -> "Pass":
        """Let a question through.

        Returns:
            What has to be told how it ended.

        Raises:
            UnavailableError: Nothing passes now (`breaker_open`).
        """
        self.check()
        given = Pass(self, self._era)
        if self._open_until is not None:
            self._trial = given
        return given

    @asynccontextmanager
    async def guard(self) -> AsyncIterator[None]:
        """Let what is inside through, and see how it ends.

        `EngineFailedError` is a failure. Any other error is neither failure nor success.

        Raises:
            UnavailableError: Nothing passes now (`breaker_open`).
        """
        given = self.before()
        try:
            yield
        except EngineFailedError:
            given.failed()
            raise
        else:
            given.succeeded()
        finally:
            given.abandoned()

    def _ended(self, given: "Pass", outcome: Literal["succeeded", "failed", "abandoned"]) -> None:
        if given.era != self._era:
            return
        if given is self._trial:
            self._trial = None
            if outcome == "succeeded":
                self._close()
            elif outcome == "failed":
                self._open(min(self._pause_s * 2, self._reset_s * MAX_FACTOR))
        elif outcome == "succeeded":
            self._failures = 0
        elif outcome == "failed":
            self._failures += 1
            if self._failures >= self._max_failures:
                self._open(self._reset_s)

    def _open(self, pause_s: float) -> None:
        self._era += 1
        self._pause_s = pause_s
        self._open_until = self._clock() + pause_s

    def _close(self) -> None:
        self._era += 1
        self._failures = 0
        self._open_until = None


class Pass:
    """A question that a breaker let through. The first that is told of how it ended counts."""

    def __init__(self, breaker: Breaker, era: int) -> None:
        self.era = era
        self._breaker: Breaker | None = breaker

    def succeeded(self) -> None:
        """The runtime answered."""
        self._end("succeeded")

    def failed(self) -> None:
        """The runtime raised an error."""
        self._end("failed")

    def abandoned(self) -> None:
        """It ended before the runtime did either."""
        self._end("abandoned")

    def _end(self, outcome: Literal["succeeded", "failed", "abandoned"]) -> None:
        breaker, self._breaker = self._breaker, None
        if breaker is not None:
            breaker._ended(self, outcome)
