"""How many threads a runtime computes with."""

from dataclasses import dataclass
from typing import Final

from fastvlm_convert.errors import BundleError
from fastvlm_convert.targets import Target


@dataclass(frozen=True)
class Threads:
    """The threads of a runtime that lets its users choose.

    Attributes:
        count: How many compute one operation; None leaves it to the runtime and to OMP_NUM_THREADS.
        spinning: Whether they wait for work in a busy loop. That is faster for one request at a time, and
            takes the processor from the others when several run.
    """

    count: int | None = None
    spinning: bool = True


DEFAULT_THREADS: Final = Threads()


def refuse_threads(target: Target, threads: Threads) -> None:
    """See that no number is asked for where the runtime decides.

    Raises:
        BundleError: One is.
    """
    if threads.count is not None:
        raise BundleError(
            f"the runtime of {target} chooses its threads itself, and {threads.count} are asked for",
            hint="leave the number of threads out, or run the bundle's onnx target",
        )
