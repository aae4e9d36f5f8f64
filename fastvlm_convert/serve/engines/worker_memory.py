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
from fastvlm_convert.errors import SettingsError
from fastvlm_convert.estimate.workload import target_work
from fastvlm_convert.serve.served_bundle import ServedBundle

MAX_WORKERS: Final = 16
_PROCESS: Final = 150_000_000
_COPIES_OF_WEIGHTS: Final = 2
_COPIES_OF_RESULTS: Final = 3
_CGROUPS: Final = Path("/sys/fs/cgroup")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")


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


def available_bytes(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Memory that more processes can take: what is free, and what limits of containers leave.

    Args:
        cgroups: Where control groups are mounted.
        membership: The file that names the groups of this process.
    """
    left = [psutil.virtual_memory().available]
    for folder, limit, usage in _groups(cgroups, membership):
        for group in (folder, *folder.parents):
            if not group.is_relative_to(cgroups):
                break
            most, used = _number(group / limit), _number(group / usage)
            if most is not None and used is not None:
                left.append(max(0, most - used + _page_cache(group / "memory.stat")))
    return min(left)


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


def _groups(cgroups: Path, membership: Path) -> list[tuple[Path, str, str]]:
    """Folders of this process's groups with the names of limit and usage: of version 2, and of version 1."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # no Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inner = path.lstrip("/")
        if not controllers:
            found.append((cgroups / inner, "memory.max", "memory.current"))
        elif "memory" in controllers.split(","):
            folder = cgroups / "memory" / inner
            found.append((folder, "memory.limit_in_bytes", "memory.usage_in_bytes"))
    return found


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:  # a container sees only its own part of the tree
        return None
    return int(text) if text.isdecimal() else None  # `max` is no limit


def _page_cache(stat: Path) -> int:
    """Bytes of a group's usage that the kernel gives back when they are needed."""
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(values.get("total_inactive_file", values.get("inactive_file", "0")))
