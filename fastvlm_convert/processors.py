"""The processors that this process may use."""

import os


def usable_cpus() -> tuple[int, ...]:
    """Numbers of the logical processors that this process may use, ascending."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def num_threads() -> int:
    """Threads to compute with: what `OMP_NUM_THREADS` says, as for torch and NumPy, else one a processor."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(asked)) if asked.isdecimal() else len(usable_cpus())
