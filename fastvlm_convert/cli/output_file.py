"""A file that a command was asked to write."""

from pathlib import Path
from typing import Annotated

import typer

from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.errors import OutputError
from fastvlm_convert.manifest import is_bundle

OutputFileOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.", show_default=False)
]
OverwriteFileOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]


def check_output_file(output: Path, model: Path, overwrite: bool) -> None:
    """See, before any work is done, that a file made from a bundle or a checkpoint may be written.

    Raises:
        OutputError: There is something already, no folder, or the place is inside the model or any bundle.
    """
    if not output.parent.is_dir():
        raise OutputError("there is no such folder", where=output.parent, hint="make it first")
    place = output.resolve()
    if any(is_bundle(folder) for folder in place.parents):
        raise OutputError(
            "a bundle holds the files that its manifest lists, and no others",
            where=output,
            hint="write it beside the bundle, or into your app",
        )
    if place.is_relative_to(model.resolve()):
        raise OutputError("models are only read", where=output, hint="write it beside the model")
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
