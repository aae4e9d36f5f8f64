"""Kills a piece of work before any chosen change that it makes to a folder."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def changes(folder: Path, work: Callable[[], object]) -> int:
    """How many changes some work makes below `folder`: files opened for writing, made, renamed, removed."""
    reader, writer = os.pipe()

    def counted() -> None:
        count = _watch(folder, lambda number: None)
        work()
        os.write(writer, str(count()).encode())

    assert not _killed(counted)
    os.close(writer)
    with os.fdopen(reader) as told:
        return int(told.read())


def kill_before(number: int, folder: Path, work: Callable[[], object]) -> None:
    """Run some work in a process of its own, which is killed before its `number`-th change below `folder`."""

    def watched() -> None:
        _watch(folder, lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == number else None)
        work()

    assert _killed(watched)


def _killed(work: Callable[[], object]) -> bool:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001  a fork must not come back into pytest
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(3)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def _watch(folder: Path, on_change: Callable[[int], object]) -> Callable[[], int]:
    count = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        is_change = event in _CHANGES
        if event == "open":
            path, _, flags = arguments
            is_path = isinstance(path, str | os.PathLike)
            is_change = is_path and isinstance(flags, int) and flags & _WRITING != 0
        if is_change and str(folder) in os.fsdecode(arguments[0]):  # type: ignore[arg-type]
            count += 1
            on_change(count)

    sys.addaudithook(watch)
    return lambda: count
