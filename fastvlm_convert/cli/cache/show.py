"""`fastvlm-convert cache show`: what is kept between runs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import typer
from rich.markup import escape

from fastvlm_convert.amounts import count_text, size_text
from fastvlm_convert.cache_entries import entries
from fastvlm_convert.cli.cache.kinds import KINDS, EntryFacts, entry_facts
from fastvlm_convert.cli.console import err, out, plain_table, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.errors import printable
from fastvlm_convert.user_cache import VARIABLE, cache_folder

EXAMPLES = """
fastvlm-convert cache show
fastvlm-convert cache show --json
"""
_FEW: Final = 3
_HOURS: Final = 24


@dataclass(frozen=True)
class KindFacts:
    """What is kept of one stage.

    Attributes:
        count: Results.
        bytes: Of all of them.
        stale: How many this version of the tool never looks at.
        stale_bytes: Of those.
    """

    count: int
    bytes: int
    stale: int
    stale_bytes: int


@dataclass(frozen=True)
class CacheShowDocument(Document, name="cache-show"):
    """What is kept between runs.

    Attributes:
        folder: Where.
        moved_by: The environment variable that moves it.
        total_bytes: Of all results.
        kinds: By stage.
        entries: Every result.
    """

    folder: str
    moved_by: str
    total_bytes: int
    kinds: dict[str, KindFacts]
    entries: tuple[EntryFacts, ...]


def command(context: typer.Context) -> None:
    """Show what is kept between runs, and where.

    Everything in it can be made again: removing it costs time. What is stale was made by other versions of
    the code, which this one never looks at; `cache clear --stale` removes it.
    """
    now = time.time()
    found = tuple(entry_facts(entry, now) for entry in entries(KINDS.values()))
    document = CacheShowDocument(
        folder=str(cache_folder()),
        moved_by=VARIABLE,
        total_bytes=sum(entry.bytes for entry in found),
        kinds={name: _kind_facts([e for e in found if e.kind == name]) for name in KINDS},
        entries=found,
    )
    report(context, "passed", document, lambda: _print(document))


def _kind_facts(found: Sequence[EntryFacts]) -> KindFacts:
    stale = [entry for entry in found if entry.stale]
    return KindFacts(
        len(found), sum(entry.bytes for entry in found), len(stale), sum(entry.bytes for entry in stale)
    )


def _print(document: CacheShowDocument) -> None:
    out.print(escape(printable(document.folder)), soft_wrap=True)
    if document.entries:
        _print_table(document)
    else:
        out.print("nothing is kept there")
    err.print(f"\n{VARIABLE} moves it; --no-cache does without it", soft_wrap=True)


def _print_table(document: CacheShowDocument) -> None:
    headings = ("kind", "count", "size", "stale", "last used", "what")
    table = plain_table(*headings, right=("count", "size", "stale"), wrap=("what",))
    for name, facts in document.kinds.items():
        if facts.count:
            found = [entry for entry in document.entries if entry.kind == name]
            stale = size_text(facts.stale_bytes) if facts.stale else "-"
            what = f"{KINDS[name].what}{_of(found)}"
            cells = (name, str(facts.count), size_text(facts.bytes), stale, _ages(found))
            table.add_row(*cells, escape(printable(what)))
    count = str(len(document.entries))
    table.add_row("[bold]total[/]", count, f"[bold]{size_text(document.total_bytes)}[/]", "", "", "")
    out.print(table)


def _ages(found: Sequence[EntryFacts]) -> str:
    """When the last was used, and the first."""
    ages = [entry.age_days for entry in found]
    last, first = _ago(min(ages)), _ago(max(ages))
    return last if last == first else f"{last} to {first}"


def _ago(days: float) -> str:
    return f"{count_text(int(days), 'day')} ago" if days >= 1 else f"{int(days * _HOURS)} h ago"


def _of(found: Sequence[EntryFacts]) -> str:
    """Checkpoints and recipes, where they are known."""
    named = [_name(entry) for entry in found]
    names = list(dict.fromkeys(name for name in named if name))
    if not names:
        return ""
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return f": {', '.join(names[:_FEW])}{more}"


def _name(entry: EntryFacts) -> str:
    checkpoint = entry.checkpoint or (entry.checkpoint_sha256 or "")[:12]
    return f"{checkpoint} ({entry.recipe})" if checkpoint and entry.recipe else checkpoint
