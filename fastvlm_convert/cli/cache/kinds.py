"""The kinds of results that are kept, and how they are written for programs."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from fastvlm_convert.cache_entries import Entry
from fastvlm_convert.evaluation.journal import JOURNALS
from fastvlm_convert.float16.report import RANGES
from fastvlm_convert.quantization.stages import ANSWERS, SEARCHED, SOLVED
from fastvlm_convert.user_cache import Kind

KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {kind.name: kind for kind in (SEARCHED, ANSWERS, SOLVED, RANGES, JOURNALS)}
)
DAY: Final = 86400.0


@dataclass(frozen=True)
class EntryFacts:
    """A result that is kept.

    Attributes:
        kind: Of which stage.
        path: The file, or the folder.
        version: Of the code that made it; null for those of before versions.
        bytes: Size of its files.
        age_days: Days since it was written or used last.
        stale: Whether this version of the tool never looks at it.
        checkpoint: Name of the checkpoint's folder, where known.
        checkpoint_sha256: The checkpoint's hash, where known.
        recipe: Name of the recipe, where known.
    """

    kind: str
    path: str
    version: str | None
    bytes: int
    age_days: float
    stale: bool
    checkpoint: str | None
    checkpoint_sha256: str | None
    recipe: str | None


def entry_facts(entry: Entry, now: float) -> EntryFacts:
    """An entry for programs, at a time in seconds since 1970."""
    return EntryFacts(
        kind=entry.kind.name,
        path=str(entry.path),
        version=".".join(map(str, entry.version)) or None,
        bytes=entry.size,
        age_days=round(age_days(entry, now), 3),
        stale=entry.is_stale,
        checkpoint=entry.about.checkpoint,
        checkpoint_sha256=entry.about.checkpoint_sha256,
        recipe=entry.about.recipe,
    )


def age_days(entry: Entry, now: float) -> float:
    """Days since an entry was written or used last; 0 where its time is yet to come."""
    return max(0.0, (now - entry.used) / DAY)
