"""The energy that answers take, where the host tells it without special rights."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

POWERCAP: Final = Path("/sys/class/powercap")
_PACKAGE: Final = "package"  # of a domain's name; the others are parts of one, or overlap with it


@dataclass(frozen=True)
class Domain:
    """A counter of energy, of one processor package.

    Attributes:
        path: Its file, in microjoules.
        wraps_at: The value after which it begins again at 0, in microjoules.
    """

    path: Path
    wraps_at: int

    def read(self) -> int:
        """What it says now, in microjoules."""
        return int(self.path.read_text())


@dataclass(frozen=True)
class Meter:
    """All processor packages of a machine, read through Linux's powercap (RAPL).

    Attributes:
        domains: Their counters.
    """

    domains: tuple[Domain, ...]

    def read(self) -> tuple[int, ...]:
        """The counters, in microjoules."""
        return tuple(domain.read() for domain in self.domains)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Energy between two readings, less than one round of a counter apart."""
        parts = zip(self.domains, before, after, strict=True)
        return sum((end - start) % (domain.wraps_at + 1) for domain, start, end in parts) / 1e6


def open_meter(root: Path = POWERCAP) -> tuple[Meter | None, str | None]:
    """The machine's meter, or the reason why there is none.

    Args:
        root: Where Linux has its counters.
    """
    if sys.platform == "darwin":
        return None, "macOS tells it to powermetrics only, which needs root"
    domains = []
    try:
        for folder in sorted(root.glob("*-rapl:*")):
            if (folder / "name").read_text().startswith(_PACKAGE):
                wraps_at = int((folder / "max_energy_range_uj").read_text())
                domain = Domain(folder / "energy_uj", wraps_at)
                domain.read()
                domains.append(domain)
    except PermissionError:
        return None, f"{root}/*/energy_uj is for root alone (chmod a+r lets everybody read it)"
    except (OSError, ValueError) as error:
        return None, f"{root} cannot be read: {error}"
    if not domains:
        return None, f"this host has no counter of energy in {root}"
    return Meter(tuple(domains)), None
