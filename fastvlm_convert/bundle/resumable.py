"""Make a folder whole or not at all, in more than one run where the first is interrupted."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import IO, Any, Final

from fastvlm_convert.bundle.folder import Kind, check_apart, placed
from fastvlm_convert.errors import ConversionError, OutputError

_PROGRESS_FILE: Final = "fastvlm-convert.progress"  # the key, then a line for each finished step
_MOVE_IT: Final = "move it, or choose another output"


@dataclass(frozen=True)
class Work:
    """A folder under construction.

    Attributes:
        folder: The folder.
        finished: Steps that are done, this run's or an earlier one's, with what was noted about each.
    """

    folder: Path
    finished: dict[str, Any]
    _progress: IO[bytes]

    def finish(self, step: str, notes: Any) -> None:  # noqa: ANN401
        """Note that a step is done; what it wrote will not be written again.

        Args:
            step: Its name.
            notes: Plain data.
        """
        self._progress.write(_line([step, notes]))
        self._progress.flush()
        self.finished[step] = notes


def partial_folder(output: Path) -> Path:
    """Where the unfinished work on a folder lies."""
    return output.with_name(f"{output.name}.partial")


@contextmanager
def resumable_folder(
    output: Path, key: str, overwrite: bool, protected: Sequence[Path], kind: Kind
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

    Raises:
        OutputError: `output` or `OUTPUT.partial` is in the way, another run works on it, or the disk is full.
    """
    partial = partial_folder(output)
    is_kept = True

    def make() -> Path:
        check_apart(partial, protected)
        _check_ours(partial, kind)
        partial.mkdir(exist_ok=True)
        return partial

    def discard(folder: Path) -> None:
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)

    with placed(output, overwrite, protected, kind, make, discard), _locked(partial) as progress:
        work = Work(partial, _finished_steps(partial, key, progress), progress)
        try:
            yield work
        except OutputError:
            raise
        except ConversionError:
            is_kept = False
            raise
        (partial / _PROGRESS_FILE).unlink()


def _check_ours(partial: Path, kind: Kind) -> None:
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise OutputError("something else is in the way", where=partial, hint=_MOVE_IT)
    progress = partial / _PROGRESS_FILE
    is_ours = progress.is_file() and not progress.is_symlink()
    if partial.is_dir() and any(partial.iterdir()) and not is_ours and not kind.is_one(partial):
        raise OutputError(
            "a folder that is no unfinished work of this tool is in the way",
            where=partial,
            hint=_MOVE_IT,
        )


@contextmanager
def _locked(partial: Path) -> Iterator[IO[bytes]]:
    with (partial / _PROGRESS_FILE).open("a+b") as progress:
        try:
            flock(progress, LOCK_EX | LOCK_NB)
        except BlockingIOError as error:
            raise OutputError("another run is working here", where=partial, hint="wait for it") from error
        yield progress


def _finished_steps(partial: Path, key: str, progress: IO[bytes]) -> dict[str, Any]:
    """The steps that an earlier run under the same key finished; else the folder is emptied."""
    progress.seek(0)
    first, *lines = progress.read().splitlines(keepends=True) or [b""]
    if first != _line(key):
        for path in partial.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _PROGRESS_FILE:
                path.unlink()
        progress.truncate(0)
        progress.write(_line(key))
        progress.flush()
        return {}
    finished: dict[str, Any] = {}
    size = len(first)
    for line in lines:
        step = _step(line)
        if step is None:  # cut off: what follows is not known to be done
            break
        finished |= step
        size += len(line)
    progress.truncate(size)
    return finished


def _step(line: bytes) -> dict[str, Any] | None:
    """The step that a line notes, or None if it is damaged."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    match value:
        case [str(step), notes]:
            return {step: notes}
    return None


def _line(value: Any) -> bytes:  # noqa: ANN401
    return json.dumps(value, ensure_ascii=True).encode() + b"\n"
