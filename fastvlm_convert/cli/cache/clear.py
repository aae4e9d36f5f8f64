"""`fastvlm-convert cache clear`: remove what is kept between runs."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.markup import escape

from fastvlm_convert.amounts import count_text, size_text
from fastvlm_convert.cache_entries import Entry, entries, remove
from fastvlm_convert.cli.cache.kinds import KINDS, EntryFacts, age_days, entry_facts
from fastvlm_convert.cli.console import out, print_warnings, report
from fastvlm_convert.cli.document import EXIT_CODES, Document, Status
from fastvlm_convert.errors import UsageError, did_you_mean, printable
from fastvlm_convert.user_cache import cache_folder

EXAMPLES = """
fastvlm-convert cache clear --stale
fastvlm-convert cache clear searched --older-than 30
"""
_FEW = 5


@dataclass(frozen=True)
class KeptEntry:
    """A result that could not be removed.

    Attributes:
        path: The file, or the folder.
        reason: Why.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class CacheClearDocument(Document, name="cache-clear", statuses=("passed", "not_run")):
    """What was removed.

    Attributes:
        folder: The cache.
        removed_bytes: Of all that was removed.
        removed: What was.
        kept: What should have been, and is still there.
    """

    folder: str
    removed_bytes: int
    removed: tuple[EntryFacts, ...]
    kept: tuple[KeptEntry, ...]


def command(
    context: typer.Context,
    kinds: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KIND]...", help=f"Only these: {', '.join(KINDS)}; all if omitted.", show_default=False
        ),
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            "--older-than",
            min=0,
            metavar="DAYS",
            help="Only what was not used for so long.",
            show_default=False,
        ),
    ] = None,
    stale: Annotated[
        bool, typer.Option("--stale", help="Only what other versions of the code made, never used again.")
    ] = False,
) -> None:
    """Remove what is kept between runs, or some of it.

    What a running process uses stays, as does whatever this tool did not write. The exit code is 2 if
    something else could not be removed.
    """
    for name in kinds or ():
        if name not in KINDS:
            hint = f"{did_you_mean(name, KINDS)}choose of: {', '.join(KINDS)}"
            raise UsageError(f"there is no kind '{printable(name)}'", hint=hint)
    now = time.time()
    chosen = [
        entry
        for entry in entries(KINDS[name] for name in dict.fromkeys(kinds or KINDS))
        if (older_than is None or age_days(entry, now) > older_than) and (entry.is_stale or not stale)
    ]
    document, status = _clear(chosen, now)
    report(context, status, document, lambda: _print(document), brief=size_text(document.removed_bytes))
    raise typer.Exit(EXIT_CODES[status])


def _clear(chosen: Sequence[Entry], now: float) -> tuple[CacheClearDocument, Status]:
    """Remove entries one by one; `not_run` where one could not be removed."""
    removed, kept = [], []
    status: Status = "passed"
    for entry in chosen:
        try:
            reason = remove(entry)
        except OSError as error:  # of one entry: the others may go
            reason, status = error.strerror or str(error), "not_run"
        if reason is None:
            removed.append(entry)
        else:
            kept.append(KeptEntry(str(entry.path), reason))
    facts = tuple(entry_facts(entry, now) for entry in removed)
    total = sum(entry.size for entry in removed)
    return CacheClearDocument(str(cache_folder()), total, facts, tuple(kept)), status


def _print(document: CacheClearDocument) -> None:
    left = [f"{printable(kept.path)} stays: {kept.reason}" for kept in document.kept]
    more = (f"and {len(left) - _FEW} more; --json lists all",) if len(left) > _FEW else ()
    print_warnings((*left[:_FEW], *more))
    if not document.removed:
        out.print("nothing was removed")
        return
    for kind, count in Counter(entry.kind for entry in document.removed).items():
        size = sum(entry.bytes for entry in document.removed if entry.kind == kind)
        out.print(f"{kind}: {count_text(count, 'result')}, {size_text(size)}", soft_wrap=True)
    where = escape(printable(document.folder))
    out.print(f"removed {size_text(document.removed_bytes)} from {where}", soft_wrap=True)
