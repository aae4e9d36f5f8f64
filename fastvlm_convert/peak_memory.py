"""The most memory that this process has used."""

import resource
from pathlib import Path


def peak_memory_bytes() -> int:
    """The most memory this process had resident so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike ru_maxrss it starts anew with the program, not with the parent's peak
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
