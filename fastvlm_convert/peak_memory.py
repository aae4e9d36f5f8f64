"""The memory that this process has used, and uses."""

import resource
from pathlib import Path


def peak_memory_bytes() -> int:
    """The most memory this process had resident so far."""
    # Unlike ru_maxrss it starts anew with the program, not with the parent's peak.
    peak = _of_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if peak is None else peak  # bytes on macOS


def resident_bytes() -> int | None:
    """The memory this process has resident now; None where the system does not tell."""
    return _of_status("VmRSS")


def _of_status(name: str) -> int | None:
    """What Linux says of this process."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
