"""A file that a command was asked to write."""

from pathlib import Path
from typing import Annotated

import typer

from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.errors import OutputError

OutputFileOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.", show_default=False)
]
OverwriteFileOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]


def check_output_file(output: Path, bundle: Path, overwrite: bool) -> None:
    """See, before any work is done, that a file made from a bundle may be written.

    Raises:
        OutputError: There is something already, no folder, or the place is inside the bundle.
    """
    if not output.parent.is_dir():
        raise OutputError("there is no such folder", where=output.parent, hint="make it first")
    if output.resolve().is_relative_to(bundle.resolve()):
        raise OutputError(
            "a bundle holds the files that its manifest lists, and no others",
            where=output,
            hint="write it beside the bundle, or into your app",
        )
    if output.is_dir():
        raise OutputError("the output is a folder", where=output, hint="give the name of a file")
    if (output.exists() or output.is_symlink()) and not overwrite:
        raise OutputError("the output exists", where=output, hint="choose another name, or --overwrite")


def write_output_file(output: Path, text: str) -> None:
    """Write a text; the file appears whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        with whole_file(output) as partial:
            partial.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        hint = "see that there is room and that you may write there"
        raise OutputError(f"cannot write: {error.strerror}", where=output, hint=hint) from error
