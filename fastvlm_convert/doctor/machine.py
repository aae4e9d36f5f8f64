"""The machine: its system, memory and disk."""

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.lint.platform import Version, version_numbers
from fastvlm_convert.processors import usable_cpus

_CGROUP: Final = Path("/sys/fs/cgroup/memory.max")
_MEMINFO: Final = Path("/proc/meminfo")


@dataclass(frozen=True)
class Machine:
    """Where this runs.

    Attributes:
        system: Its name and version.
        architecture: Of the processor.
        python: Version of Python.
        cpus: Processors that this process may use.
        memory_bytes: Memory that this process may use, all of it.
        available_bytes: What of it is free; None where the system does not tell.
        free_disk_bytes: Room in the current folder, where a bundle is made unless told otherwise.
    """

    system: str
    architecture: str
    python: str
    cpus: int
    memory_bytes: int
    available_bytes: int | None
    free_disk_bytes: int

    @property
    def versions(self) -> dict[str, Version]:
        """Of the system, by the names that known-bad pairs have."""
        found: dict[str, Version] = {}
        if self.architecture in ("arm64", "aarch64"):
            found["arm64"] = ()
        if mac := platform.mac_ver()[0]:
            found["macos"] = version_numbers(mac)
        return found


def this_machine() -> Machine:
    """What this machine is and has."""
    mac = platform.mac_ver()[0]
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = _text(_CGROUP)
    if group.isdigit():
        limit = min(limit, int(group))
    available = _available()
    return Machine(
        system=f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        python=platform.python_version(),
        cpus=len(usable_cpus()),
        memory_bytes=limit,
        available_bytes=None if available is None else min(available, limit),
        free_disk_bytes=shutil.disk_usage(Path.cwd()).free,
    )


def _available() -> int | None:
    """Memory that can be had without swapping, as Linux estimates it."""
    for line in _text(_MEMINFO).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _text(path: Path) -> str:
    """The content of a file of the kernel; empty where there is none."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
