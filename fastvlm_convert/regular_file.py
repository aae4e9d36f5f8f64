"""Every file that this tool reads is opened here: regular files of a sane size, and nothing else.

Opening a pipe blocks until somebody writes to it, and a device such as /dev/zero never ends. What is wrong
is always an `OSError`, whose `strerror` is a sentence for people.
"""

import codecs
import errno
import os
import stat
from io import FileIO
from pathlib import Path
from typing import Final

MAX_TEXT_BYTES: Final = 32 << 20  # a tokenizer.json of Qwen2 takes 7 MB, everything else far less

_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_UTF16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class UnreadableFileError(OSError):
    """Something has the name of a file, but cannot be read as one."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(None, message, str(path))


def open_file(path: Path, max_bytes: int | None = None) -> FileIO:
    """Open a file for reading, without a buffer.

    Args:
        path: The file; a link to one is followed.
        max_bytes: The largest size that makes sense, or None for files that are read piece by piece.

    Raises:
        FileNotFoundError: There is nothing of that name.
        UnreadableFileError: It is no regular file, a link to nothing, or too large.
        OSError: It cannot be opened.
    """
    try:
        # Without O_NONBLOCK the call would wait for a pipe's other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError:  # a zero byte, which no name can hold
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except FileNotFoundError:
        if path.is_symlink():
            message = f"it is a link to {path.readlink()}, which is missing"
            raise UnreadableFileError(message, path) from None
        raise
    except OSError:
        _check_kind(path.stat(), path)  # a socket cannot even be opened; the reason is better than ENXIO
        raise
    try:
        status = os.fstat(descriptor)
        _check_kind(status, path)
        _check_size(status.st_size, max_bytes, path)
        return open(descriptor, "rb", buffering=0)  # noqa: PTH123  a descriptor, not a path
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a file; raises as `open_file` does."""
    with open_file(path, max_bytes) as file:
        return file.read(max_bytes + 1)[:max_bytes]  # it may have grown meanwhile


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The content of a text file in UTF-8, or in UTF-16 where it begins with a byte-order mark.

    Raises:
        OSError: As `open_file`.
        ValueError: It is no text.
    """
    return decoded(read_file(path, max_bytes))


def decoded(raw: bytes) -> str:
    """Bytes as text; a byte-order mark, which Windows' editors write, is left out.

    Raises:
        ValueError: They are neither UTF-8 nor UTF-16 with a byte-order mark.
    """
    encoding, name = ("utf-16", "UTF-16") if raw.startswith(_UTF16) else ("utf-8-sig", "UTF-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no {name} text") from None


def is_there(path: Path) -> bool:
    """Whether anything has this name, also a pipe or a link to nothing, which reading then explains."""
    return os.path.lexists(path)


def _check_size(size: int, max_bytes: int | None, path: Path) -> None:
    if max_bytes is not None and size > max_bytes:
        raise UnreadableFileError(f"it has {size} bytes, at most {max_bytes} make sense here", path)


def _check_kind(status: os.stat_result, path: Path) -> None:
    for is_kind, name in _KINDS:
        if is_kind(status.st_mode):
            raise UnreadableFileError(f"it is {name}, not a file", path)
