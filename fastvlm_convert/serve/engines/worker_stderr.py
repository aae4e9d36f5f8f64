"""What a worker writes to standard error, in the server's log."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from fastvlm_convert.errors import printable, shortened

_LOG: Final = logging.getLogger(__name__)
_BLOCK: Final = 1 << 14
_MAX_LINE: Final = 500
_LINES_A_MINUTE: Final = 100
_TAIL: Final = 8


class WorkerStderr:
    """Logs the lines of a worker: shortened, and at most a hundred a minute.

    Args:
        number: The worker's.
        clock: In seconds.
    """

    def __init__(self, number: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._number = number
        self._clock = clock
        self._last: deque[str] = deque(maxlen=_TAIL)
        self._minute_began = clock()
        self._lines = 0
        self._left_out = 0

    async def read(self, stream: asyncio.StreamReader) -> None:
        """Log everything until the worker ends."""
        line = b""
        while block := await stream.read(_BLOCK):
            *lines, line = (line + block).split(b"\n")
            for one in lines:
                self._add(one)
            line = line[:_BLOCK]  # a line without an end must not grow
        if line:
            self._add(line)
        self._tell_left_out()

    def last_words(self) -> str | None:
        """The last line that says something, for an error message; None if there is none."""
        return next((line for line in reversed(self._last) if line.strip()), None)

    def _add(self, line: bytes) -> None:
        text = shortened(printable(line.decode(errors="replace")), _MAX_LINE)
        self._last.append(text)
        now = self._clock()
        if now - self._minute_began >= 60:
            self._tell_left_out()
            self._minute_began, self._lines = now, 0
        self._lines += 1
        if self._lines <= _LINES_A_MINUTE:
            _LOG.warning("worker %d: %s", self._number, text)
        else:
            self._left_out += 1

    def _tell_left_out(self) -> None:
        if self._left_out:
            _LOG.warning("worker %d: %d more lines are left out", self._number, self._left_out)
            self._left_out = 0
