"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends without an error.

    A run that was killed leaves its half of a file. The next run that writes the same one removes it: who is
    still at work holds a lock, which ends with the process.

    Raises:
        OSError: The file cannot be put there.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    _remove_leftovers(path)
    with partial.open("ab") as lock:
        flock(lock, LOCK_EX)
        try:
            yield partial
            to_disk(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def put_file(path: Path, content: bytes) -> None:
    """Put a small file in its place, whole as long as the power does not fail: its reader must notice damage.

    Unlike `whole_file` it neither waits for the disk nor looks for what killed runs left, so that hundreds of
    files take no longer than their bytes.

    Raises:
        OSError: The file cannot be put there.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        with partial.open("wb") as file:
            flock(file, LOCK_EX)
            file.write(content)
            file.flush()
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk itself.

    Without it a power failure may leave a name without its content.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    start, end = f".{path.stem}.", f".partial{path.suffix}"
    with suppress(OSError):  # whatever cannot be removed harms nobody
        for other in list(path.parent.iterdir()):
            if not (other.name.startswith(start) and other.name.endswith(end)):
                continue
            if other.name[len(start) : -len(end)].isdigit() and not other.is_symlink():
                _remove_unless_held(other)


def _remove_unless_held(file: Path) -> None:
    with suppress(OSError), file.open("rb") as lock:
        flock(lock, LOCK_EX | LOCK_NB)
        file.unlink()
