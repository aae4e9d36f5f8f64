"""What lies in the user's cache, and removing it.

Only what this tool itself writes there is seen: regular files and folders with the names that `user_cache`
gives them, never through a link. All else in those folders is somebody's, and stays.
"""

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.errors import OutputError
from fastvlm_convert.json_file import read_json_file
from fastvlm_convert.user_cache import About, Kind, about_path, cache_folder

_PARTIAL: Final = r"\.\d+\.partial"
_VERSION: Final = re.compile(r"v\d{1,6}(\.\d{1,6}){0,7}")
# Files of an entry that is a folder; killed runs leave `.NAME.PID.partial.SUFFIX`.
_INNER: Final = re.compile(rf"\.?[\w.\-]+\.safetensors|\.?(answers|about)({_PARTIAL})?\.json")
_IN_USE: Final = "in use by a running process"


@dataclass(frozen=True)
class Entry:
    """A result that is kept.

    Attributes:
        kind: Of which stage.
        path: The file, or the folder.
        version: Of the code that made it, as its folder says; empty for those of before versions.
        size: Bytes of its files.
        used: When it was written or used last, in seconds since 1970.
        about: What it is of.
        is_stale: Whether this version of the tool never looks at it.
    """

    kind: Kind
    path: Path
    version: tuple[int, ...]
    size: int
    used: float
    about: About
    is_stale: bool


def entries(kinds: Iterable[Kind]) -> list[Entry]:
    """What is kept, by kind and name.

    Raises:
        OutputError: The cache is no folder.
        OSError: A folder cannot be read.
    """
    root = cache_folder()
    if not root.exists():
        return []
    if not root.is_dir():
        raise OutputError("the cache is no folder", where=root, hint="set FASTVLM_CONVERT_CACHE to a folder")
    return [entry for kind in kinds for entry in _entries_of(kind, root / kind.name)]


def remove(entry: Entry) -> str | None:
    """Remove an entry, unless a running process uses it or it holds something else.

    Returns:
        Why it is left, or None where it is gone.

    Raises:
        OSError: It cannot be removed.
    """
    try:
        with _lock(entry) as is_free:
            if not is_free:
                return _IN_USE
            if not entry.kind.suffix:
                return _remove_folder(entry.path)
            _remove_file(entry)
            return None
    except FileNotFoundError:  # somebody else removed it
        return None


def _entries_of(kind: Kind, folder: Path) -> Iterator[Entry]:
    if not _is_folder(folder):
        return
    yield from _entries_in(kind, folder, ())
    for path in sorted(folder.iterdir()):
        if _VERSION.fullmatch(path.name) and _is_folder(path):
            yield from _entries_in(kind, path, tuple(map(int, path.name[1:].split("."))))


def _entries_in(kind: Kind, folder: Path, version: tuple[int, ...]) -> Iterator[Entry]:
    key = rf"[0-9a-f]{{{kind.digits}}}"
    end = re.escape(kind.suffix)
    name = re.compile(rf"{key}{end}|\.{key}(\.about)?{_PARTIAL}({end}|\.json)" if kind.suffix else key)
    for path in sorted(folder.iterdir()):
        if not name.fullmatch(path.name):
            continue
        files = _files_of(kind, path)
        if files is None:
            continue
        is_left = path.name.startswith(".")
        about = _about(kind, path)
        size = sum(status.st_size for status in files if stat.S_ISREG(status.st_mode))
        used = max((status.st_mtime for status in files), default=0.0)
        # What a later version made is of use to that version, which may be installed too.
        yield Entry(kind, path, version, size, used, about, is_left or version < kind.version)


def _files_of(kind: Kind, path: Path) -> list[os.stat_result] | None:
    """Of an entry's files, and of its folder; None where it is not what this tool writes."""
    with suppress(FileNotFoundError):  # removed meanwhile
        status = path.lstat()
        if not kind.suffix:
            return [status, *_regular(path.iterdir())] if stat.S_ISDIR(status.st_mode) else None
        if stat.S_ISREG(status.st_mode):
            return [status, *_regular(_companions(kind, path))]
    return None


def _regular(paths: Iterable[Path]) -> list[os.stat_result]:
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                found.append(status)
    return found


def _companions(kind: Kind, path: Path) -> Sequence[Path]:
    """Files that may lie beside an entry: what it is of, and the lock of a journal."""
    return about_path(path, kind), path.with_suffix(".lock")


def _about(kind: Kind, path: Path) -> About:
    if kind.is_of_checkpoint and not path.name.startswith("."):
        return About(checkpoint_sha256=path.name.removesuffix(kind.suffix))
    try:
        value = read_json_file(about_path(path, kind), 1 << 16)
        return About(*(_text(value.get(key)) for key in ("checkpoint", "checkpoint_sha256", "recipe")))
    except (OSError, ValueError, AttributeError):  # older versions wrote none; a damaged one says nothing
        return About()


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


@contextmanager
def _lock(entry: Entry) -> Iterator[bool]:
    """Keep others from using an entry; yields whether nobody does.

    Who uses a folder holds a lock of the folder, who writes a file one of the unfinished file, who adds to a
    journal one of the file beside it. A file that is complete is read at once, or not at all.
    """
    locked = entry.path
    if entry.kind.suffix and not entry.path.name.startswith("."):
        locked = entry.path.with_suffix(".lock")
        if not locked.is_file():
            yield True
            return
    descriptor = os.open(locked, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _remove_file(entry: Entry) -> None:
    entry.path.unlink()
    if not entry.path.name.startswith("."):
        for path in _companions(entry.kind, entry.path):
            path.unlink(missing_ok=True)


def _remove_folder(folder: Path) -> str | None:
    """Remove a folder, with the files that this tool writes into it and no others."""
    inside = list(folder.iterdir())
    foreign = [p.name for p in inside if not _INNER.fullmatch(p.name) or not stat.S_ISREG(p.lstat().st_mode)]
    if foreign:
        return f"there is something else in it: {min(foreign)!r}"
    for path in inside:
        path.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return "something was put into it meanwhile"
    return None
