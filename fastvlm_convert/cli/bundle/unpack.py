"""`fastvlm-convert bundle unpack`: a bundle's folder from a zip file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fastvlm_convert.amounts import size_text
from fastvlm_convert.cli.console import out, print_warnings, progress, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.delivery.unpack import unpack

EXAMPLES = """
fastvlm-convert bundle unpack app.zip -o app
fastvlm-convert bundle unpack app.zip -o app --overwrite --quiet
"""


@dataclass(frozen=True)
class UnpackDocument(Document, name="bundle-unpack"):
    """A bundle that was unpacked.

    Attributes:
        file: The zip file.
        bundle: The folder that was made.
        files: How many files are in it.
        total_bytes: Their size.
        warnings: What the user should know.
    """

    file: str
    bundle: str
    files: int
    total_bytes: int
    warnings: tuple[str, ...]


def command(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Zip file of a bundle.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to make.", show_default=False)
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
) -> None:
    """Unpack a bundle from a zip file, whoever made it.

    Checks names, kinds, sizes and hashes against the manifest in it. The folder appears whole or not at all.
    """
    notes: list[str] = []
    with progress(flags_of(context).is_silent) as on_stage:
        manifest = unpack(file, output, overwrite, notes.append, on_stage)
    total = sum(entry.size for entry in manifest.files.values())
    document = UnpackDocument(
        file=str(file),
        bundle=str(output),
        files=len(manifest.files),
        total_bytes=total,
        warnings=tuple(notes),
    )

    def show() -> None:
        print_warnings(tuple(notes))
        made = f"{output}: {len(manifest.files)} files, {size_text(total)}, all as the manifest says"
        out.print(made, markup=False, soft_wrap=True)

    report(context, "passed", document, show, brief=str(output))
