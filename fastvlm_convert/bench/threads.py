"""The same number of threads, on the same processors, for every contender and every runtime."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from fastvlm_convert.bench.machine import core_leaders
from fastvlm_convert.errors import UsageError
from fastvlm_convert.processors import usable_cpus

# OpenMP (torch), and the libraries of matrix products that torch, NumPy and MLX bring. Our session of
# ONNX Runtime, which knows none of them, takes OpenMP's.
_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


@dataclass(frozen=True)
class Pinning:
    """Where contenders run.

    Attributes:
        threads: Threads of every runtime.
        cpus: Logical processors that they are bound to; None where the system binds no process.
    """

    threads: int
    cpus: tuple[int, ...] | None

    def environment(self) -> Mapping[str, str]:
        """The environment of a contender's process."""
        return {**os.environ, **dict.fromkeys(_VARIABLES, str(self.threads))}

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Binds this thread, and with it every process that it starts, which then stays bound."""
        if self.cpus is None:
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cpus)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


def pinning(threads: int | None) -> Pinning:
    """Where contenders run.

    Args:
        threads: How many threads; None takes one for each physical core.

    Raises:
        UsageError: There are not as many processors.
    """
    usable, leaders = usable_cpus(), core_leaders()
    count = len(leaders) if threads is None else threads
    if count > len(usable):
        raise UsageError(
            f"{count} threads, and this process may use {len(usable)} processors",
            where="--threads",
            hint=f"give at most --threads {len(usable)}",
        )
    # A core's second processor shares its units with the first, so it comes last.
    in_order = [*leaders, *(cpu for cpu in usable if cpu not in leaders)]
    can_bind = hasattr(os, "sched_setaffinity")
    return Pinning(count, tuple(sorted(in_order[:count])) if can_bind else None)
