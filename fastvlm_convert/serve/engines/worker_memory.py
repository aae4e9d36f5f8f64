"""How much memory a worker needs, and how much there is.

A worker needs

    a process with its libraries + 2 x files + 3 x intermediate results + KV cache + its share of the caches

with files, results and cache as `fastvlm-convert estimate` counts them from the graphs. A runtime keeps a
second copy of weights that it reorders, and its arena keeps what results have left. Measured after a
question: the demo 117 to 159 MB (176 expected), int4 at the shape of the 0.5B 1571 MB (1773 expected).
"""

from pathlib import Path
from typing import Final

import psutil

from fastvlm_convert.amounts import size_text
from fastvlm_convert.available_memory import CGROUPS, MEMBERSHIP, group_limits
from fastvlm_convert.errors import SettingsError
from fastvlm_convert.estimate.workload import target_work
from fastvlm_convert.serve.served_bundle import ServedBundle

MAX_WORKERS: Final = 16
_PROCESS: Final = 150_000_000
_COPIES_OF_WEIGHTS: Final = 2
_COPIES_OF_RESULTS: Final = 3


def worker_bytes(bundle: ServedBundle, cache_bytes: int) -> int:
    """Memory that a worker needs at most.

    Args:
        bundle: What it runs.
        cache_bytes: Its share of the caches.

    Raises:
        BundleError: A file is missing or damaged.
        MissingDependencyError: The package that reads the format is not installed.
    """
    work = target_work(bundle.path, bundle.manifest, bundle.target)
    results = max(w.peak_bytes for w in (work.vision, work.prefill, work.decode_at_context))
    copies = _COPIES_OF_WEIGHTS * work.file_bytes + _COPIES_OF_RESULTS * results
    return _PROCESS + copies + work.cache_bytes + cache_bytes


def available_bytes(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Memory that more processes can take: what is free, and what limits of containers leave.

    Args:
        cgroups: Where control groups are mounted.
        membership: The file that names the groups of this process.
    """
    return min([psutil.virtual_memory().available, *(left for _, left in group_limits(cgroups, membership))])


def check_memory(workers: int, each_bytes: int, free_bytes: int) -> None:
    """Refuse more workers than memory holds.

    Raises:
        SettingsError: Says how many fit.
    """
    if workers > MAX_WORKERS:
        raise SettingsError(f"max_workers is {workers}, expected at most {MAX_WORKERS}", ("max_workers",))
    fit = free_bytes // each_bytes
    if workers > fit:
        raise SettingsError(
            f"{workers} workers need {size_text(workers * each_bytes)}, {size_text(each_bytes)} each; "
            f"{size_text(free_bytes)} of memory is free",
            ("max_workers",),
            hint=f"set max_workers to {fit}" if fit else "free memory, or serve a smaller bundle",
        )
