"""How much memory a function takes, so that one that cannot fit is refused instead of swapping."""

import math
import os
import resource
from collections.abc import Iterable
from typing import Final

from fastvlm_convert.mil.description import FunctionSpec
from fastvlm_convert.mil.steps import Block, CondStep, LoopStep

_BYTES: Final = 4  # an element is held as float32 or int32


def machine_bytes() -> int:
    """Memory of this machine, or of this process if it is limited."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return physical if limit == resource.RLIM_INFINITY else min(physical, limit)


def footprint(block: Block, spec: FunctionSpec, constants: Iterable[int]) -> int:
    """Bytes that a function takes: decoded constants, states, and the most that its values take at a time.

    Values whose shape is known only when it runs do not count.

    Args:
        block: Its steps.
        spec: What it takes and gives.
        constants: Bytes of each decoded constant.
    """
    states = sum(_size(state.type.fixed_shape) for state in spec.states)
    return sum(constants) + states + _peak(block)


def _peak(block: Block) -> int:
    live: dict[int, int] = {}
    now = most = 0
    for step in block.steps:
        for output in step.outputs:
            live[output.slot] = _size(output.shape)
            now += live[output.slot]
        inner: tuple[Block, ...] = ()
        if isinstance(step, CondStep):
            inner = step.branches
        elif isinstance(step, LoopStep):
            inner = (step.condition, step.body)
        most = max(most, now + max(map(_peak, inner), default=0))
        now -= sum(live.pop(slot, 0) for slot in step.frees)
    return most


def _size(shape: tuple[int, ...] | None) -> int:
    return 0 if shape is None else _BYTES * math.prod(shape)
