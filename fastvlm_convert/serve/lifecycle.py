"""From loading to the end: what the server is ready for, and how it ends without losing answers."""

import asyncio
import contextlib
from typing import Final, Literal

Phase = Literal["loading", "ready", "draining"]
_LAST_WORDS_S: Final = 1.0
_LAST_WORDS_SHARE: Final = 0.2


class Lifecycle:
    """In which phase the server is, and how many questions it has in its hands.

    Attributes:
        phase: The phase.
        failure: Why the bundles could not be loaded.
    """

    def __init__(self) -> None:
        self.phase: Phase = "loading"
        self.failure: BaseException | None = None
        self._in_hand = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_hand(self) -> int:
        """Questions that have come and whose last byte is not sent."""
        return self._in_hand

    def took(self) -> None:
        """A question came."""
        self._in_hand += 1
        self._idle.clear()

    def gave(self) -> None:
        """One has its answer, or its client left."""
        self._in_hand -= 1
        if not self._in_hand:
            self._idle.set()

    async def drained(self, seconds: float) -> bool:
        """Wait until nothing is in hand; whether that came true in time.

        Args:
            seconds: When all must be over; a little of it is kept for telling those who get no answer.
        """
        kept = min(_LAST_WORDS_S, _LAST_WORDS_SHARE * seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds - kept):
                await self._idle.wait()
        return self._idle.is_set()
