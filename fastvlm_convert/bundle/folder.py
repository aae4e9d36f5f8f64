"""Make a folder whole or not at all.

The work is done in a folder beside the output, which holds `PROGRESS_FILE`: whoever works there holds a lock
on that file, and the lock ends with the process. So a folder with the file and without the lock is what a
killed run left. An output that is replaced moves into the finished folder first and is deleted last; where a
run is killed between the two renames, the next one moves it back.
"""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import IO, Final

from fastvlm_convert.atomic_file import to_disk
from fastvlm_convert.bundle.contents import strays_in_bundle, strays_in_quantized
from fastvlm_convert.checkpoint.quantized_checkpoint import is_quantized
from fastvlm_convert.errors import OutputError
from fastvlm_convert.manifest import PROGRESS_FILE, is_bundle

_REPLACED: Final = "fastvlm-convert.replaced"  # where the old output waits for the new one to take its place
_MOVE_IT: Final = "move it, or choose another output"
_ANOTHER: Final = "choose another folder"
_FEW: Final = 8  # files that a message names

Say = Callable[[str], None]


@dataclass(frozen=True)
class Kind:
    """What a folder is to become.

    Attributes:
        name: What people call it.
        is_one: Whether a folder is one already, so that `--overwrite` may replace it.
        strays: Files in such a folder that this tool did not put there, relative to it.
    """

    name: str
    is_one: Callable[[Path], bool]
    strays: Callable[[Path], list[str]]


BUNDLE: Final = Kind("bundle", is_bundle, strays_in_bundle)
QUANTIZED_CHECKPOINT: Final = Kind("quantized checkpoint", is_quantized, strays_in_quantized)


@dataclass(frozen=True)
class Place:
    """Where a folder is to be made.

    Attributes:
        output: The folder.
        partial: The folder to work in, beside it.
        overwrite: Whether an existing one of its kind may be replaced.
        protected: Input folders; they are not written to, nor is a folder that holds one replaced.
        kind: What is made.
        say: Called with what the user should know.
    """

    output: Path
    partial: Path
    overwrite: bool
    protected: Sequence[Path]
    kind: Kind
    say: Say


@contextmanager
def new_folder(
    output: Path,
    overwrite: bool,
    protected: Sequence[Path],
    say: Say = lambda note: None,
    kind: Kind = BUNDLE,
) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends without an error.

    Args:
        output: The folder to make.
        overwrite: Whether one of its kind may be replaced; it stays until the new one is complete.
        protected: Input folders; they are not written to, nor is a folder that holds one replaced.
        say: Called with what the user should know.
        kind: What is made.

    Raises:
        OutputError: `output` exists and may not be replaced, another run is making it, or its parent cannot
            be written to.
    """
    check_apart(output, protected)
    partial = partial_beside(output, f".{output.name}.partial")
    place = Place(output, partial, overwrite, protected, kind, say)
    was_there = os.path.lexists(partial)
    with placed(place, discard=_remove_whole):
        if was_there:
            remove(entries(partial))
            say(f"removed what an interrupted run had left in {partial}")
        yield partial


def partial_beside(output: Path, name: str) -> Path:
    """The folder to work in.

    Raises:
        OutputError: The output has no name of its own that another could be made of.
    """
    if output.name in ("", ".."):
        raise OutputError(
            "the output must be a folder of its own",
            where=str(output) if output.name else f"'{output}'",
            hint="give the folder to make, for example: -o out/bundle",
        )
    return output.with_name(name)


@contextmanager
def placed(place: Place, discard: Callable[[Path], None]) -> Iterator[IO[bytes]]:
    """`place.partial`, locked, takes the place of the output when the block ends without an error.

    Args:
        place: Where.
        discard: Called with the folder after an error.

    Yields:
        Its progress file.

    Raises:
        OutputError: As `new_folder`.
    """
    try:
        _check_output(place)
        new_parents = [parent for parent in place.output.parents if not parent.exists()]
        place.output.parent.mkdir(parents=True, exist_ok=True)
        _check_ours(place)
        place.partial.mkdir(exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(
            "cannot write here: this is no folder", where=error.filename, hint=_ANOTHER
        ) from error
    except OSError as error:
        raise OutputError(
            f"cannot write here: {error.strerror}", where=place.output.parent, hint=_ANOTHER
        ) from error
    try:
        with _locked(place.partial) as progress:
            try:
                if _repair(place):
                    _check_output(place)
                yield progress
                _replace(place)
            except BaseException:
                if not (place.partial / _REPLACED).exists():  # else the next run moves it back
                    discard(place.partial)
                raise
            finally:
                if _is_file(progress, place.output / PROGRESS_FILE):
                    _clean(place.output)
    except OSError as error:
        raise OutputError(
            f"cannot write: {error.strerror}",
            where=error.filename or place.output,
            hint="see that there is room and that you may write there",
        ) from error
    finally:
        with suppress(OSError):  # they hold the output now, or something else
            for parent in new_parents:
                parent.rmdir()


def check_apart(folder: Path, protected: Sequence[Path]) -> None:
    """See that a folder neither holds an input nor lies inside one.

    Raises:
        OutputError: It does.
    """
    resolved = _real(folder)
    for path in map(_real, protected):
        if path.is_relative_to(resolved) or resolved.is_relative_to(path):
            raise OutputError("the output holds an input or lies inside one", where=folder, hint=_ANOTHER)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, links in a circle do not stop it


def _check_output(place: Place) -> None:
    output, kind = place.output, place.kind
    if output.is_symlink():
        raise OutputError("the output is a link", where=output, hint="give the folder itself")
    check_apart(output, place.protected)
    check_apart(place.partial, place.protected)
    if not output.exists():
        return
    if not output.is_dir():
        what = "a file" if output.is_file() else "a pipe" if output.is_fifo() else "a device"
        raise OutputError(f"the output is {what}, not a folder", where=output, hint="choose another name")
    if not place.overwrite:
        _tidy(output)
        raise OutputError("the output exists", where=output, hint="add --overwrite to replace it")
    if not kind.is_one(output):
        raise OutputError(
            f"the output is no {kind.name} of this tool, so --overwrite does not replace it",
            where=output,
            hint="delete it yourself, or choose another folder",
        )
    if strays := kind.strays(output):
        more = f" and {len(strays) - _FEW} more" if len(strays) > _FEW else ""
        raise OutputError(
            f"the output holds files that are not the {kind.name}'s: {', '.join(strays[:_FEW])}{more}",
            where=output,
            hint="move them elsewhere, or choose another folder",
        )


def _check_ours(place: Place) -> None:
    """See that the folder to work in is free, or what an earlier run left."""
    partial = place.partial
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise OutputError("something else is in the way", where=partial, hint=_MOVE_IT)
    if not partial.exists():
        return
    is_ours = _is_plain(partial / PROGRESS_FILE)
    if any(partial.iterdir()) and not is_ours:
        raise OutputError(
            "a folder that is no unfinished work of this tool is in the way", where=partial, hint=_MOVE_IT
        )


def _is_plain(path: Path) -> bool:
    """Whether it is a regular file, itself and not through a link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[IO[bytes]]:
    """The progress file of a folder, which nobody else has locked."""
    path = folder / PROGRESS_FILE
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except FileNotFoundError as error:  # the folder was there a moment ago
        raise _busy(folder) from error
    with open(descriptor, "r+b") as progress:  # noqa: PTH123
        try:
            flock(progress, LOCK_EX | LOCK_NB)
        except BlockingIOError as error:
            raise _busy(folder) from error
        if not _is_file(progress, path):  # who held the lock has moved the folder
            raise _busy(folder)
        yield progress


def _is_file(opened: IO[bytes], path: Path) -> bool:
    """Whether an open file has this name."""
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _busy(folder: Path) -> OutputError:
    return OutputError(
        "another run is working here", where=folder, hint="wait for it, or choose another output"
    )


def _repair(place: Place) -> bool:
    """Undo half a replacement; whether there was one."""
    old = place.partial / _REPLACED
    if old.is_symlink() or not old.is_dir():
        return False
    if place.output.exists():  # somebody made another one meanwhile: neither is ours to delete
        raise OutputError(
            f"an interrupted run left the {place.kind.name} that it was replacing",
            where=old,
            hint="move it to where you want it",
        )
    old.rename(place.output)
    place.say(f"an interrupted run had moved {place.output} away; it was put back")
    return True


def _replace(place: Place) -> None:
    """Put the finished folder in the place of the output."""
    output, partial = place.output, place.partial
    for path in partial.rglob("*"):
        if _is_plain(path):
            to_disk(path)
    if output.exists() or output.is_symlink():
        if not place.overwrite:
            raise _made_meanwhile(output)
        _check_output(place)
    old = partial / _REPLACED
    try:
        if output.exists():
            output.rename(old)
        partial.rename(output)
    except BaseException as error:
        if old.is_dir() and not output.exists():
            old.rename(output)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _made_meanwhile(output) from error
        raise
    to_disk(output.parent)


def _made_meanwhile(output: Path) -> OutputError:
    return OutputError(
        "another run has made the output meanwhile; nothing was replaced",
        where=output,
        hint="add --overwrite to replace it",
    )


def _tidy(output: Path) -> None:
    """Finish what a run left that was killed after its last rename."""
    if not output.is_symlink() and _is_plain(output / PROGRESS_FILE):
        with suppress(OutputError, OSError), _locked(output):
            _clean(output)


def _clean(output: Path) -> None:
    """Remove from a finished output what only its making needed."""
    shutil.rmtree(output / _REPLACED, ignore_errors=True)
    (output / PROGRESS_FILE).unlink()


def entries(folder: Path) -> list[Path]:
    """What lies in a folder under construction, its progress file aside."""
    return [path for path in folder.iterdir() if path.name != PROGRESS_FILE]


def remove(paths: Sequence[Path]) -> None:
    """Delete files, links and whole folders."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove_whole(folder: Path) -> None:
    """Delete a folder under construction, its progress file last: by that the rest is known as ours."""
    with suppress(OSError):
        remove(entries(folder))
        (folder / PROGRESS_FILE).unlink()
        folder.rmdir()
