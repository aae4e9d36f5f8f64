"""`fastvlm-convert bundle pack`: a bundle in the layout of a store, or as one file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.markup import escape

from fastvlm_convert.amounts import size_text
from fastvlm_convert.cli.console import err, out, plain_table, print_warnings, progress, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.options import BundleArgument
from fastvlm_convert.cli.store_texts import FitFacts, fit_facts, fit_text
from fastvlm_convert.delivery.pack import PackResult, pack
from fastvlm_convert.delivery.stores import Destination
from fastvlm_convert.errors import UsageError, did_you_mean

EXAMPLES = """
fastvlm-convert bundle pack app --for play -o android-project
fastvlm-convert bundle pack app --for zip -o app.zip
"""
_DESTINATIONS: tuple[Destination, ...] = get_args(Destination)
_NEXT = {
    "play": "next: move the module into your project; its build.gradle.kts says how it is included",
    "background-assets": "next, on a Mac, in that folder: xcrun ba-package Manifest.json -o model.aar",
    "zip": "unpack: fastvlm-convert bundle unpack FILE -o FOLDER",
}


@dataclass(frozen=True)
class PackDocument(Document, name="bundle-pack"):
    """A bundle that was packed.

    Attributes:
        bundle: The bundle's folder.
        destination: What it was packed for.
        output: The folder or file that was made.
        files: Bytes of every file in it.
        total_bytes: Of all of them.
        store: What the store counts; None for a zip.
        warnings: What the user should know.
    """

    bundle: str
    destination: Destination
    output: str
    files: dict[str, int]
    total_bytes: int
    store: FitFacts | None
    warnings: tuple[str, ...]


def command(
    context: typer.Context,
    bundle: BundleArgument,
    destination: Annotated[
        str,
        typer.Option(
            "--for", metavar="|".join(_DESTINATIONS), help="What it is packed for.", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Folder to make; for zip a file.", show_default=False
        ),
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what this command made before.")
    ] = False,
) -> None:
    """Pack a bundle for a store, or into one zip file.

    play: AI packs of Play for On-device AI, as Gradle modules. background-assets: files and manifest for
    Apple's ba-package. zip: one file, the same bytes every time. Every file is checked first.
    """
    if destination not in _DESTINATIONS:
        hint = f"{did_you_mean(destination, _DESTINATIONS)}choose one of: {', '.join(_DESTINATIONS)}"
        raise UsageError(f"--for does not know '{destination}'", hint=hint)
    notes: list[str] = []
    with progress(flags_of(context).is_silent) as on_stage:
        result = pack(bundle, destination, output, overwrite, notes.append, on_stage)
    document = PackDocument(
        bundle=str(bundle),
        destination=destination,
        output=str(output),
        files=result.files,
        total_bytes=sum(result.files.values()),
        store=None if result.fit is None else fit_facts(result.fit),
        warnings=tuple(notes),
    )
    report(context, "passed", document, lambda: _print(result, tuple(notes), destination), brief=str(output))


def _print(result: PackResult, notes: tuple[str, ...], destination: str) -> None:
    print_warnings(notes)
    table = plain_table("file", "size", right=("size",))
    for name, size in result.files.items():
        table.add_row(escape(name), size_text(size))
    table.add_row("[bold]total[/]", f"[bold]{size_text(sum(result.files.values()))}[/]")
    out.print(table)
    if result.fit is not None:
        out.print(f"\n{fit_text(result.fit)}", soft_wrap=True)
    err.print(f"\n{_NEXT[destination]}", soft_wrap=True)
