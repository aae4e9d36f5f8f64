"""How much memory this process may have: what the machine has, and what limits of containers leave."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MEMINFO: Final = Path("/proc/meminfo")
CGROUPS: Final = Path("/sys/fs/cgroup")
MEMBERSHIP: Final = Path("/proc/self/cgroup")


def memory_limit_bytes() -> int:
    """The most memory this process may have, whatever others use."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(most for most, _ in group_limits())])


def available_memory_bytes() -> int | None:
    """Memory that can be had without swapping, as Linux estimates it; None on other systems."""
    found = [int(line.split()[1]) * 1024 for line in _lines(_MEMINFO) if line.startswith("MemAvailable:")]
    return min([*found, *(left for _, left in group_limits())]) if found else None


def group_limits(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Iterator[tuple[int, int]]:
    """The limit of every control group around this process that has one, and what it leaves, in bytes.

    Args:
        cgroups: Where control groups are mounted.
        membership: The file that names the groups of this process.
    """
    for folder, limit, usage in _groups(cgroups, membership):
        for group in (folder, *folder.parents):
            if not group.is_relative_to(cgroups):
                break
            most, used = _number(group / limit), _number(group / usage)
            if most is not None and used is not None:
                yield most, max(0, most - used + _page_cache(group / "memory.stat"))


def _groups(cgroups: Path, membership: Path) -> list[tuple[Path, str, str]]:
    """Folders of this process's groups with the names of limit and usage: of version 2, and of version 1."""
    found = []
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        inner = path.lstrip("/")
        if not controllers:
            found.append((cgroups / inner, "memory.max", "memory.current"))
        elif "memory" in controllers.split(","):
            folder = cgroups / "memory" / inner
            found.append((folder, "memory.limit_in_bytes", "memory.usage_in_bytes"))
    return found


def _number(path: Path) -> int | None:
    text = "".join(_lines(path))
    return int(text) if text.isdecimal() else None  # `max` is no limit


def _page_cache(stat: Path) -> int:
    """Bytes of a group's usage that the kernel gives back when they are needed."""
    values = dict(line.split(" ", 1) for line in _lines(stat) if " " in line)
    return int(values.get("total_inactive_file", values.get("inactive_file", "0")))


def _lines(path: Path) -> list[str]:
    """Of a file of the kernel; empty where there is none: a container sees only its own part of the tree."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
