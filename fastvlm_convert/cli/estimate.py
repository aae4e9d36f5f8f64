"""`fastvlm-convert estimate`: what phones can do with a bundle at best, by its files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fastvlm_convert.amounts import size_text
from fastvlm_convert.cli.console import err, out, plain_table, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.options import BundleArgument
from fastvlm_convert.estimate.ceilings import Ceiling, Estimate, estimate
from fastvlm_convert.estimate.phones import load_phones, shipped_phones, with_own
from fastvlm_convert.estimate.workload import TargetWork

EXAMPLES = """
fastvlm-convert estimate app
fastvlm-convert estimate app --phones mine.yaml --json
"""
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class EstimateDocument(Estimate, Document, name="estimate"):
    """What phones could do with a bundle at best."""


def command(
    context: typer.Context,
    bundle: BundleArgument,
    phones: Annotated[
        Path | None,
        typer.Option(
            "--phones",
            metavar="FILE.yaml",
            help="More phones; a row named as one of ours replaces it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Estimate what phones can do with a bundle at best.

    Counts bytes and multiplications in its files and divides by what is published of phones: ceilings, no
    predictions. Reads graphs and headers, runs nothing.
    """
    table = shipped_phones()
    if phones is not None:
        table = with_own(table, load_phones(phones))
    result = estimate(bundle, table)
    document = EstimateDocument(**vars(result))
    report(context, "passed", document, lambda: _print(result, flags_of(context).quiet))


def _print(result: Estimate, quiet: bool) -> None:
    out.print(f"[bold]{escape(result.label)}[/]\n", soft_wrap=True)
    for work in result.targets:
        out.print(_work_table(work))
        out.print()
        out.print(_phones_table(work, [c for c in result.ceilings if c.target == work.target]))
        out.print()
    for note in result.notes:
        err.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    for missing in result.not_run:
        err.print(f"[yellow]{missing.target} not run:[/] {escape(missing.reason)}", soft_wrap=True)
    if not quiet:
        err.print(
            "<= at most, >= at least. Left out: heat, scheduling, kernels, what else the phone does. "
            "Sources of every figure: --json, and docs/estimate.md",
            soft_wrap=True,
            markup=False,
        )


def _work_table(work: TargetWork) -> Table:
    """What the target's files take, one row a step."""
    numbers = ("MACs", "weights", "rows", "cache", "results", "at a time")
    table = plain_table(work.target, *numbers, right=numbers)
    for name, step in (
        ("vision", work.vision),
        (f"prefill, {work.num_image_tokens} tokens", work.prefill),
        ("a token after the picture", work.decode_after_picture),
        (f"a token at {work.context_length}", work.decode_at_context),
    ):
        sizes = (step.weight_bytes, step.row_bytes, step.cache_bytes, step.activation_bytes, step.peak_bytes)
        table.add_row(name, _count(step.macs), *(size_text(size) for size in sizes))
    return table


def _phones_table(work: TargetWork, ceilings: list[Ceiling]) -> Table:
    numbers = ("tok/s", f"at {work.context_length}", "first token", "memory")
    table = plain_table(work.target, *numbers, right=numbers)
    for found in ceilings:
        table.add_row(
            escape(found.phone),
            _rate(found.decode_after_picture),
            _rate(found.decode_at_context),
            _first_token(found),
            _memory(found),
        )
    return table


def _rate(rate: float | None) -> str:
    return _UNKNOWN if rate is None else f"<= {rate:,.0f}"


def _first_token(found: Ceiling) -> str:
    if found.first_token:
        return ", ".join(f">= {_milliseconds(first.seconds)} ({first.unit})" for first in found.first_token)
    if found.first_token_memory_s is not None:
        return f">= {_milliseconds(found.first_token_memory_s)} (memory alone)"
    return _UNKNOWN


def _memory(found: Ceiling) -> str:
    needs = size_text(found.memory_bytes)
    if found.fits is None:
        return f"{needs}, limit unknown"
    limit = "its RAM" if found.limit_bytes is None else size_text(found.limit_bytes)
    return f"[green]{needs} of {limit}[/]" if found.fits else f"[bold red]{needs}, more than {limit}[/]"


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.2g} ms" if value < 10 else f"{value:,.0f} ms"


def _count(value: int) -> str:
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:,.1f} {unit}"
    return str(value)
