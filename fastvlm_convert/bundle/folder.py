"""Make a folder whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastvlm_convert.errors import OutputError
from fastvlm_convert.manifest import is_bundle


@contextmanager
def new_folder(output: Path, overwrite: bool, protected: list[Path]) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends without an error.

    Args:
        output: The folder to make.
        overwrite: Whether an existing bundle may be replaced; it stays until the new one is complete.
        protected: Input folders; they are not written to, nor is a folder that holds one replaced.

    Raises:
        OutputError: `output` exists and may not be replaced, or its parent cannot be written to.
    """
    try:
        _check_output(output, overwrite, protected)
        new_parents = [parent for parent in output.parents if not parent.exists()]
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError("cannot write here: this is no folder", where=error.filename) from error
    except OSError as error:
        raise OutputError(f"cannot write here: {error.strerror}", where=output.parent) from error
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        _replace(partial, output, overwrite)
    except OSError as error:
        raise OutputError(f"cannot write: {error.strerror}", where=error.filename or output) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # they hold the output now, or something else
            for parent in new_parents:
                parent.rmdir()


def _check_output(output: Path, overwrite: bool, protected: list[Path]) -> None:
    if output.is_symlink():
        raise OutputError("the output is a link", where=output, hint="give the folder itself")
    resolved = output.resolve()
    for path in protected:
        if path.resolve().is_relative_to(resolved) or resolved.is_relative_to(path.resolve()):
            raise OutputError(
                "the output holds an input or lies inside one", where=output, hint="choose another folder"
            )
    if not output.exists():
        return
    if not overwrite:
        raise OutputError("the output exists", where=output, hint="add --overwrite to replace it")
    if not is_bundle(output):
        raise OutputError(
            "the output is no bundle of this tool, so --overwrite does not replace it",
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
