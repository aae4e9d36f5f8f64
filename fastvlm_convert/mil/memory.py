"""When values may be overwritten: a cache of gigabytes must not be copied for every token.

Operations that move values may share memory with their inputs. So values fall into groups that may share
memory, together with the states they were read from and with what is not ours: inputs and constants. A slice
may be updated in place if nobody reads anything of its group afterwards, and if a state in the group is
written with the result before it is read again.
"""

from typing import Final

from fastvlm_convert.mil.constants import Constant
from fastvlm_convert.mil.ops.table import InPlace
from fastvlm_convert.mil.steps import Block, CallStep, ReadStep, Step, WriteStep

_FOREIGN: Final = "not ours"

Member = int | str  # a slot, a state as `state:name`, or `_FOREIGN`


class _Groups:
    """Sets of what may share memory; they only grow."""

    def __init__(self) -> None:
        self._of: dict[Member, set[Member]] = {}

    def of(self, member: Member) -> set[Member]:
        return self._of.setdefault(member, {member})

    def join(self, a: Member, b: Member) -> None:
        small, large = sorted((self.of(a), self.of(b)), key=len)
        if small is not large:
            large |= small
            for member in small:
                self._of[member] = large


def plan_memory(function: Block, half_states: frozenset[str]) -> frozenset[int]:
    """Decide which updates of slices are made in place, and what writing each state needs.

    Args:
        function: The function; its steps are changed.
        half_states: States that are stored as float16 and hold values rounded to it.

    Returns:
        Slots of the outputs that must be copied before they are handed out.
    """
    steps = function.steps
    groups = _Groups()
    last_use = {
        slot: i for i, step in enumerate(steps) for slot in (*step.reads, *(o.slot for o in step.outputs))
    }
    last_use |= {slot: len(steps) for slot in function.outputs if isinstance(slot, int)}
    stored: set[int] = set()  # slots whose values are rounded as their state is
    for slot in function.inputs:
        groups.join(slot, _FOREIGN)
    for i, step in enumerate(steps):
        if isinstance(step, ReadStep):
            groups.join(step.outputs[0].slot, _state(step.state))
            if step.state in half_states:
                stored.add(step.outputs[0].slot)
        elif isinstance(step, WriteStep):
            _plan_write(step, groups, stored)
        elif isinstance(step, CallStep) and step.type == "slice_update":
            _plan_update(step, i, steps, groups, stored, last_use)
        elif step.moves:
            shared: list[Member] = [*step.reads, *(o.slot for o in step.outputs)]
            if not isinstance(step, CallStep):  # a branch or loop may read any state and constant
                shared += [_FOREIGN, *(_state(s.state) for s in steps if isinstance(s, ReadStep))]
            elif step.reads_constant:
                shared.append(_FOREIGN)
            for member in shared[1:]:
                groups.join(shared[0], member)
    return frozenset(
        slot
        for slot in function.outputs
        if isinstance(slot, int) and any(isinstance(m, str) for m in groups.of(slot))
    )


def _state(name: str) -> str:
    return f"state:{name}"


def _plan_write(step: WriteStep, groups: _Groups, stored: set[int]) -> None:
    if isinstance(step.data, Constant):
        return
    if step.data in stored:
        step.rounds = False
    if not step.rounds:
        others = {m for m in groups.of(step.data) if isinstance(m, str)} - {_state(step.state)}
        step.copies = bool(others)
        if not step.copies:
            groups.join(step.data, _state(step.state))


def _plan_update(
    step: CallStep,
    i: int,
    steps: list[Step],
    groups: _Groups,
    stored: set[int],
    last_use: dict[int, int],
) -> None:
    """One update of a slice: rounded as the state it came from, and in place where that is safe."""
    slots = {name: slot for name, slot, _ in step.dynamic}
    x, out = slots.get("x"), step.outputs[0].slot
    if x is None:
        return
    if x in stored:
        stored.add(out)
        step.rounds_update = True
    group = groups.of(x)
    unread = all(last_use.get(m, i) <= i for m in group if isinstance(m, int))
    names = {m for m in group if isinstance(m, str)}
    if (
        not unread
        or "update" not in slots
        or slots["update"] in group
        or not _is_written(names, out, i, steps)
    ):
        return
    step.fixed["in_place"] = InPlace.YES
    groups.join(x, out)


def _is_written(names: set[str], out: int, i: int, steps: list[Step]) -> bool:
    """Whether the one state that may share the memory, if there is one, next becomes the result."""
    if not names:
        return True
    if len(names) > 1 or _FOREIGN in names:
        return False
    for step in steps[i + 1 :]:
        if isinstance(step, ReadStep | WriteStep):
            if _state(step.state) in names:
                return isinstance(step, WriteStep) and step.data == out
        elif not isinstance(step, CallStep):
            return False
    return False
