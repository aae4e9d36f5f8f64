"""Standard output and error as the command line needs them.

Exit code 1 means a failed check, so nothing that happens to a stream may end in it: Python itself exits with
1 or 120 where a stream is closed or its disk is full.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NoReturn, TextIO, cast

from fastvlm_convert.errors import OutputError

_DESCRIPTORS: Final = (0, 1, 2)


class _Guarded:
    """A stream whose failures are handled; everything else is the stream's own."""

    def __init__(self, stream: TextIO, on_failure: Callable[[OSError], None]) -> None:
        self.stream = stream
        self.failed = False
        self._on_failure = on_failure

    def write(self, text: str) -> int:
        """Write, or handle the failure."""
        try:
            return self.stream.write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or handle the failure."""
        try:
            self.stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failed = True
        self._on_failure(error)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.stream, name)


class _Closed:
    """What stands for a standard output that the caller has closed."""

    encoding = "utf-8"

    def write(self, text: str) -> NoReturn:
        """Nobody can read it."""
        raise OSError(errno.EBADF, "it is closed")

    def flush(self) -> None:
        """There is nothing to flush."""

    def isatty(self) -> bool:
        """It is none."""
        return False


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Within the block a standard output that fails is an `OutputError`, and standard error never fails.

    A pipe whose reader has gone stays a `BrokenPipeError`: nobody is left to be told.
    """
    _reserve_descriptors()
    before = sys.stdout, sys.stderr
    out = _Guarded(cast(TextIO, _Closed()) if before[0] is None else before[0], _refuse)
    # Text of a file may hold what the terminal cannot show.
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
        err = _Guarded(nowhere if before[1] is None else before[1], lambda _error: None)
        for stream in (out, err):
            if hasattr(stream.stream, "reconfigure"):
                stream.stream.reconfigure(errors="backslashreplace")
        sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
        try:
            yield
        finally:
            with suppress(OSError, OutputError):
                out.flush()
            err.flush()
            sys.stdout, sys.stderr = before
            for stream in (out, err):
                if stream.failed:
                    _drop_buffer(stream.stream)


def _refuse(error: OSError) -> NoReturn:
    if isinstance(error, BrokenPipeError):
        raise error
    raise OutputError(
        f"cannot write to standard output: {error.strerror}", hint="redirect it to where there is room"
    ) from error


def _reserve_descriptors() -> None:
    """Else the next file that is opened gets the number of a closed stream, and what libraries print."""
    for descriptor in _DESCRIPTORS:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def _drop_buffer(stream: TextIO) -> None:
    """What could not be written would be tried again at exit, and fail again with exit code 120."""
    with suppress(OSError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
