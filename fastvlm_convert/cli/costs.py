"""What stages took and found in the cache, as `export` and `quantize` print it."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from fastvlm_convert.amounts import count_text, size_text
from fastvlm_convert.cli.console import plain_table
from fastvlm_convert.stage_costs import StageCost
from fastvlm_convert.user_cache import CacheUse


def costs_table(stages: Sequence[StageCost]) -> Table:
    """One row for each stage, and the total."""
    numbers = ("seconds", "CPU seconds", "peak memory")
    table = plain_table("stage", *numbers, right=numbers)
    for cost in stages:
        seconds = (f"{number:.1f}" for number in (cost.seconds, cost.cpu_seconds))
        table.add_row(cost.stage, *seconds, size_text(cost.peak_memory_bytes))
    totals = (sum(cost.seconds for cost in stages), sum(cost.cpu_seconds for cost in stages))
    peak = size_text(highest(stages))
    table.add_row("total", *(f"{number:.1f}" for number in totals), peak, style="bold")
    return table


def highest(stages: Sequence[StageCost]) -> int:
    """The most memory that any of the stages had."""
    return max(cost.peak_memory_bytes for cost in stages)


def cache_text(used: Mapping[str, CacheUse]) -> str | None:
    """What an earlier run had made already; None where it was nothing."""
    found = [
        f"{each.found} of {count_text(each.found + each.made, 'result')} '{name}'"
        for name, each in used.items()
        if each.found
    ]
    return f"found in the cache: {', '.join(found)}" if found else None
