"""The machine: its system, memory and disk."""

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from fastvlm_convert.available_memory import available_memory_bytes, memory_limit_bytes
from fastvlm_convert.lint.platform import Version, version_numbers
from fastvlm_convert.processors import usable_cpus


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
    return Machine(
        system=f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        python=platform.python_version(),
        cpus=len(usable_cpus()),
        memory_bytes=memory_limit_bytes(),
        available_bytes=available_memory_bytes(),
        free_disk_bytes=shutil.disk_usage(Path.cwd()).free,
    )
