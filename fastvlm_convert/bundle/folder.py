"""Make a folder whole or not at all."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.checkpoint.quantized_checkpoint import is_quantized
from fastvlm_convert.errors import OutputError
from fastvlm_convert.manifest import is_bundle


@dataclass(frozen=True)
class Kind:
    """What a folder is to become.

    Attributes:
        name: What people call it.
        is_one: Whether a folder is one already, so that `--overwrite` may replace it.
    """

    name: str
    is_one: Callable[[Path], bool]


BUNDLE: Final = Kind("bundle", is_bundle)
QUANTIZED_CHECKPOINT: Final = Kind("quantized checkpoint", is_quantized)


@contextmanager
def new_folder(output: Path, overwrite: bool, protected: Sequence[Path]) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends without an error.

    Args:
        output: The bundle to make.
        overwrite: Whether an existing bundle may be replaced; it stays until the new one is complete.
        protected: Input folders; they are not written to, nor is a folder that holds one replaced.

    Raises:
        OutputError: `output` exists and may not be replaced, or its parent cannot be written to.
    """

    def make() -> Path:
        return Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))

    def discard(partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)

    with placed(output, overwrite, protected, BUNDLE, make, discard) as partial:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private


@contextmanager
def placed(
    output: Path,
    overwrite: bool,
    protected: Sequence[Path],
    kind: Kind,
    make: Callable[[], Path],
    discard: Callable[[Path], None],
) -> Iterator[Path]:
    """A folder that takes the place of `output` when the block ends without an error.

    Args:
        output: The folder to make.
        overwrite: Whether an existing one of its kind may be replaced.
        protected: Input folders.
        kind: What is made.
        make: Makes the folder to work in, beside `output`.
        discard: Called with that folder in the end; where all went well, it is no longer there.

    Raises:
        OutputError: `output` exists and may not be replaced, or its parent cannot be written to.
    """
    try:
        _check_output(output, overwrite, protected, kind)
        new_parents = [parent for parent in output.parents if not parent.exists()]
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = make()
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError("cannot write here: this is no folder", where=error.filename) from error
    except OSError as error:
        raise OutputError(f"cannot write here: {error.strerror}", where=output.parent) from error
    try:
        yield partial
        _replace(partial, output, overwrite)
    except OSError as error:
        raise OutputError(f"cannot write: {error.strerror}", where=error.filename or output) from error
    finally:
        discard(partial)
        with suppress(OSError):  # they hold the output now, or something else
            for parent in new_parents:
                parent.rmdir()


def check_apart(folder: Path, protected: Sequence[Path]) -> None:
    """See that a folder neither holds an input nor lies inside one.

    Raises:
        OutputError: It does.
    """
    resolved = folder.resolve()
    for path in protected:
        if path.resolve().is_relative_to(resolved) or resolved.is_relative_to(path.resolve()):
            raise OutputError(
                "the output holds an input or lies inside one", where=folder, hint="choose another folder"
            )


def _check_output(output: Path, overwrite: bool, protected: Sequence[Path], kind: Kind) -> None:
    if output.is_symlink():
        raise OutputError("the output is a link", where=output, hint="give the folder itself")
    check_apart(output, protected)
    if not output.exists():
        return
    if not overwrite:
        raise OutputError("the output exists", where=output, hint="add --overwrite to replace it")
    if not kind.is_one(output):
        raise OutputError(
            f"the output is no {kind.name} of this tool, so --overwrite does not replace it",
            where=output,
            hint="delete it yourself, or choose another folder",
        )


def _replace(partial: Path, output: Path, overwrite: bool) -> None:
    if not (overwrite and output.exists()):
        partial.rename(output)
        return
    old = partial.with_name(partial.name + ".old")
    output.rename(old)
    try:
        partial.rename(output)
    except BaseException:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
