"""Make a folder whole or not at all, in more than one run where the first is interrupted.

What an earlier run left is not trusted. A line of the progress file counts only if it is whole and its
checksum is right; files that no line claims are not ours and are refused, never written to or deleted;
whether a finished step's data is still what was written is for who wrote it to check.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from fastvlm_convert.bundle.folder import Kind, Place, Say, check_apart, entries, partial_beside, placed
from fastvlm_convert.errors import ConversionError, OutputError
from fastvlm_convert.manifest import PROGRESS_FILE

_CLAIM: Final = "files"  # lines are [_CLAIM, names] and [_STEP, name, notes], behind the key
_STEP: Final = "step"
_FEW: Final = 8  # files that a message names


@dataclass(frozen=True)
class Work:
    """A folder under construction.

    Attributes:
        folder: The folder.
        finished: Steps that are done, this run's or an earlier one's, with what was noted about each.
        say: Called with what the user should know.
    """

    folder: Path
    finished: dict[str, Any]
    say: Say
    _claimed: set[str]
    _progress: IO[bytes]

    def claim(self, names: Iterable[str]) -> None:
        """Note which files are about to be written, before they are: a later run knows them as ours.

        Args:
            names: Their names, in the folder itself.
        """
        new = sorted(set(names) - self._claimed)
        if new:
            self._note([_CLAIM, new])
            self._claimed.update(new)

    def finish(self, step: str, notes: Any) -> None:  # noqa: ANN401
        """Note that a step is done, once its data is on the disk; it will not be done again.

        Args:
            step: Its name.
            notes: Plain data.
        """
        self._note([_STEP, step, notes])
        self.finished[step] = notes

    def _note(self, value: Any) -> None:  # noqa: ANN401
        self._progress.write(_line(value))
        self._progress.flush()
        os.fsync(self._progress.fileno())


def partial_folder(output: Path) -> Path:
    """Where the unfinished work on a folder lies; raises as `partial_beside` does."""
    return partial_beside(output, f"{output.name}.partial")


@contextmanager
def resumable_folder(
    output: Path,
    key: str,
    overwrite: bool,
    protected: Sequence[Path],
    kind: Kind,
    say: Say = lambda note: None,
) -> Iterator[Work]:
    """The folder `OUTPUT.partial`, which takes the place of `output` when the block ends without an error.

    An interrupted run leaves it; a later one with the same key finds its finished steps. An error of the
    input removes it, for no later run with that key could do better.

    Args:
        output: The folder to make.
        key: What the content depends on, hashed; work under another key is thrown away.
        overwrite: Whether an existing folder of its kind may be replaced once the new one is complete.
        protected: Input folders; they are not written to, nor is a folder that holds one replaced.
        kind: What is made.
        say: Called with what the user should know.

    Raises:
        OutputError: `output` or `OUTPUT.partial` is in the way, `OUTPUT.partial` holds files that are not
            ours, another run works on it, or the disk is full.
    """
    check_apart(output, protected)
    partial = partial_folder(output)
    place = Place(output, partial, overwrite, protected, kind, say)
    lost: set[str] | None = None  # files of work that no later run could finish

    def discard(folder: Path) -> None:
        if lost is not None:
            _discard(folder, lost)

    with placed(place, discard) as progress:
        work = _resumed(partial, key, progress, say)
        try:
            yield work
        except OutputError:
            raise
        except ConversionError:
            lost = work._claimed
            raise


def _resumed(partial: Path, key: str, progress: IO[bytes], say: Say) -> Work:
    """What an earlier run under the same key left; all else that is ours is deleted."""
    progress.seek(0)
    first, *lines = progress.read().splitlines(keepends=True) or [b""]
    claimed: set[str] = set()
    finished: dict[str, Any] = {}
    size = len(first)
    for line in lines:
        match _value(line):
            case ["files", [*names]]:
                claimed.update(name for name in names if Path(name).name == name)
            case ["step", str(step), notes]:
                finished[step] = notes
            case _:  # cut off or damaged: what follows is not known to be done
                break
        size += len(line)
    _check_foreign(partial, claimed)
    if first == _line(key):
        progress.truncate(size)
        return Work(partial, finished, say, claimed, progress)
    _remove(partial, claimed)
    progress.truncate(0)
    work = Work(partial, {}, say, set(), progress)
    work._note(key)
    return work


def _check_foreign(partial: Path, claimed: set[str]) -> None:
    """See that every file was written by us, and is a file of its own: writing to it changes no other."""
    foreign = []
    for path in entries(partial):
        status = path.lstat()
        is_own = path.is_file() and not path.is_symlink() and status.st_nlink == 1
        is_empty_folder = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
        if not (path.name in claimed and is_own) and not is_empty_folder:
            foreign.append(path.name)
    if foreign:
        more = f" and {len(foreign) - _FEW} more" if len(foreign) > _FEW else ""
        raise OutputError(
            "the unfinished work cannot go on: beside its own files there are "
            f"{', '.join(sorted(foreign)[:_FEW])}{more}",
            where=partial,
            hint="move them elsewhere, or delete the folder to start anew",
        )


def _remove(partial: Path, claimed: Iterable[str]) -> None:
    for name in claimed:
        (partial / name).unlink(missing_ok=True)
    for path in entries(partial):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()  # which refuses unless it is empty


def _discard(partial: Path, claimed: Iterable[str]) -> None:
    """Delete the work, but not what somebody else put beside it."""
    _remove(partial, claimed)
    if not entries(partial):
        (partial / PROGRESS_FILE).unlink()
        partial.rmdir()


def _line(value: Any) -> bytes:  # noqa: ANN401
    text = json.dumps(value, allow_nan=False).encode()
    return b"%s %s\n" % (_checksum(text), text)


def _value(line: bytes) -> Any:  # noqa: ANN401
    """What a line notes, or None if it is damaged."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != _checksum(text):
        return None
    return json.loads(text)


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()
