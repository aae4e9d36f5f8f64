"""`fastvlm-convert bundle diff`: what differs between two bundles."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fastvlm_convert.amounts import count_text, size_text
from fastvlm_convert.cli.console import err, out, plain_table, report, status_text
from fastvlm_convert.cli.document import Document
from fastvlm_convert.delivery.diff import BundleDiff, FileChange, LayerChange, Quality, diff_bundles
from fastvlm_convert.errors import printable, shown

EXAMPLES = """
fastvlm-convert bundle diff app-fp16 app-int4
fastvlm-convert bundle diff app-fp16 app-int4 --json
"""
_WORDS = {"only_a": "only in A", "only_b": "only in B", "changed": "changed", "same": "same"}
_FEW = 12  # layers and settings that are printed one by one


@dataclass(frozen=True)
class BothSizes:
    """Bytes of either bundle."""

    a: int
    b: int


@dataclass(frozen=True)
class BothValues:
    """A setting in either bundle."""

    a: Any
    b: Any


@dataclass(frozen=True)
class BothSchemes:
    """How many layers either bundle stores in each way."""

    a: dict[str, int]
    b: dict[str, int]


@dataclass(frozen=True)
class BothQualities:
    """What was recorded of either bundle's answers."""

    a: Quality
    b: Quality


@dataclass(frozen=True)
class DiffDocument(Document, name="bundle-diff"):
    """What differs between two bundles.

    Attributes:
        a: Folder of the first.
        b: Folder of the second.
        total_bytes: Size of each.
        settings: Settings of recipe, contract and source that differ, by path.
        files: Every file of either.
        layers: Layers that differ; None where a bundle does not say how it stores its layers.
        schemes: Of each: layers by part and scheme.
        quality: Of each.
    """

    a: str
    b: str
    total_bytes: BothSizes
    settings: dict[str, BothValues]
    files: tuple[FileChange, ...]
    layers: tuple[LayerChange, ...] | None
    schemes: BothSchemes
    quality: BothQualities


def command(
    context: typer.Context,
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a bundle.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of another.", show_default=False)],
) -> None:
    """Compare two bundles: files, layers, schemes, sizes and quality.

    Reads manifests and records only. Quality is what `verify --record` wrote into a bundle, else not_run.
    """
    found = diff_bundles(a, b)
    document = DiffDocument(
        a=str(a),
        b=str(b),
        total_bytes=BothSizes(*found.sizes),
        settings={key: BothValues(*values) for key, values in found.settings.items()},
        files=found.files,
        layers=found.layers,
        schemes=BothSchemes(*map(dict, found.schemes)),
        quality=BothQualities(*found.quality),
    )
    report(context, "passed", document, lambda: _print(found))


def _print(found: BundleDiff) -> None:
    tables = [
        _settings_table(found),
        _files_table(found),
        _schemes_table(found),
        _quality_table(found.quality),
    ]
    for table in tables:
        if table.row_count:
            out.print(table)
            out.print()
    _print_layers(found.layers)
    for name, quality in zip("AB", found.quality, strict=True):
        if quality.reason is not None:
            err.print(f"quality of {name} {status_text('not_run')}: {escape(quality.reason)}", soft_wrap=True)


def _settings_table(found: BundleDiff) -> Table:
    table = plain_table("setting", "A", "B", wrap=("A", "B"))
    for n, (key, (one, two)) in enumerate(found.settings.items()):
        if n == _FEW:
            table.add_row(f"and {len(found.settings) - _FEW} more", "", "")
            break
        table.add_row(*(escape(printable(text)) for text in (key, shown(one), shown(two))))
    return table


def _files_table(found: BundleDiff) -> Table:
    table = plain_table("file", "A", "B", "", right=("A", "B"))
    same = [change for change in found.files if change.change == "same"]
    for change in found.files:
        if change.change != "same":
            table.add_row(escape(printable(change.name)), *_sizes(change), _WORDS[change.change])
    if same:
        size = size_text(sum(change.size_a or 0 for change in same))
        table.add_row(count_text(len(same), "file"), size, size, "same")
    table.add_row("[bold]total[/]", *(f"[bold]{size_text(size)}[/]" for size in found.sizes), "")
    return table


def _sizes(change: FileChange) -> tuple[str, str]:
    one, two = ("" if size is None else size_text(size) for size in (change.size_a, change.size_b))
    return one, two


def _schemes_table(found: BundleDiff) -> Table:
    table = plain_table("layers stored as", "A", "B", right=("A", "B"))
    one, two = found.schemes
    for key in dict.fromkeys((*one, *two)):
        table.add_row(escape(printable(key)), str(one.get(key, 0)), str(two.get(key, 0)))
    return table


def _quality_table(quality: tuple[Quality, Quality]) -> Table:
    table = plain_table("quality", "A", "B", right=("A", "B"))
    table.add_row("verified", *(status_text(q.status) for q in quality))
    for key in dict.fromkeys((*quality[0].figures, *quality[1].figures)):
        values = [q.figures.get(key, "-") for q in quality]
        texts = [value if isinstance(value, str) else f"{value:.3g}" for value in values]
        table.add_row(escape(printable(key)), *texts)
    return table


def _print_layers(layers: tuple[LayerChange, ...] | None) -> None:
    if layers is None:
        err.print("layers not compared: a bundle of an earlier version does not list them", soft_wrap=True)
        return
    if not layers:
        out.print("every layer is stored in the same way", soft_wrap=True)
        return
    out.print(f"{len(layers)} layer{' differs' if len(layers) == 1 else 's differ'}", soft_wrap=True)
    for change in layers[:_FEW]:
        one, two = ("absent" if layer is None else layer.scheme for layer in (change.a, change.b))
        out.print(escape(printable(f"  {change.layer}: {one} -> {two}")), soft_wrap=True)
    if len(layers) > _FEW:
        out.print(f"  and {len(layers) - _FEW} more; --json lists all", soft_wrap=True)
