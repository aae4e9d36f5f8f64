"""When values may be overwritten: a cache of gigabytes must not be copied for every token.

Operations that move values may share memory with their inputs. So values fall into groups that may share
memory, together with the states they were read from and with what is not ours: inputs and constants. A slice
may be updated in place if nobody reads anything of its group afterwards, and if a state in the group is
written with the result before it is read again.
"""

import bisect
from dataclasses import dataclass, field
from typing import Final

from fastvlm_convert.mil.constants import Constant
from fastvlm_convert.mil.ops.table import InPlace
from fastvlm_convert.mil.steps import Block, CallStep, CondStep, LoopStep, ReadStep, Step, WriteStep

_FOREIGN: Final = "not ours"

Member = int | str  # a slot, a state as `state:name`, or `_FOREIGN`


@dataclass
class _Group:
    """What may share memory.

    Attributes:
        slots: Its values.
        foreign: The states they were read from, and `_FOREIGN`.
        last_use: The last step that reads one of its values.
    """

    slots: set[int] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)
    last_use: int = -1


class _Groups:
    """Groups of what may share memory; they only grow."""

    def __init__(self, last_use: dict[int, int]) -> None:
        self._last_use = last_use
        self._of: dict[Member, _Group] = {}

    def of(self, member: Member) -> _Group:
        if member in self._of:
            return self._of[member]
        if isinstance(member, int):
            group = _Group({member}, last_use=self._last_use.get(member, -1))
        else:
            group = _Group(foreign={member})
        self._of[member] = group
        return group

    def join(self, a: Member, b: Member) -> None:
        small, large = sorted((self.of(a), self.of(b)), key=lambda g: len(g.slots) + len(g.foreign))
        if small is large:
            return
        large.slots |= small.slots
        large.foreign |= small.foreign
        large.last_use = max(large.last_use, small.last_use)
        for slot in small.slots:
            self._of[slot] = large
        for name in small.foreign:
            self._of[name] = large


class _Timeline:
    """When states are read and written, and where branches and loops are that might do so."""

    def __init__(self, steps: list[Step]) -> None:
        self._steps = steps
        self._of_state: dict[str, list[int]] = {}
        self._control = [i for i, s in enumerate(steps) if isinstance(s, CondStep | LoopStep)]
        for i, step in enumerate(steps):
            if isinstance(step, ReadStep | WriteStep):
                self._of_state.setdefault(_state(step.state), []).append(i)

    def states(self) -> list[str]:
        """All states that are read or written."""
        return list(self._of_state)

    def becomes(self, state: str, slot: int, after: int) -> bool:
        """Whether a state, next after a step, is written with a value, and nothing may read it before."""
        events = self._of_state.get(state, [])
        at = bisect.bisect_right(events, after)
        if at == len(events):
            return False
        control = bisect.bisect_right(self._control, after)
        if control < len(self._control) and self._control[control] < events[at]:
            return False
        step = self._steps[events[at]]
        return isinstance(step, WriteStep) and step.data == slot


def plan_memory(function: Block, half_states: frozenset[str]) -> frozenset[int]:
    """Decide which updates of slices are made in place, and what writing each state needs.

    Args:
        function: The function; its steps are changed.
        half_states: States that are stored as float16 and hold values rounded to it.

    Returns:
        Slots of the outputs that must be copied before they are handed out.
    """
    steps = function.steps
    last_use = {
        slot: i for i, step in enumerate(steps) for slot in (*step.reads, *(o.slot for o in step.outputs))
    }
    last_use |= {slot: len(steps) for slot in function.outputs if isinstance(slot, int)}
    groups, timeline = _Groups(last_use), _Timeline(steps)
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
            _plan_update(step, i, groups, timeline, stored)
        elif step.moves:
            shared: list[Member] = [*step.reads, *(o.slot for o in step.outputs)]
            if not isinstance(step, CallStep):  # a branch or loop may read any state and constant
                shared += [_FOREIGN, *timeline.states()]
            elif step.reads_constant:
                shared.append(_FOREIGN)
            for member in shared[1:]:
                groups.join(shared[0], member)
    return frozenset(s for s in function.outputs if isinstance(s, int) and groups.of(s).foreign)


def _state(name: str) -> str:
    return f"state:{name}"


def _plan_write(step: WriteStep, groups: _Groups, stored: set[int]) -> None:
    if isinstance(step.data, Constant):
        return
    if step.data in stored:
        step.rounds = False
    if not step.rounds:
        step.copies = bool(groups.of(step.data).foreign - {_state(step.state)})
        if not step.copies:
            groups.join(step.data, _state(step.state))


def _plan_update(step: CallStep, i: int, groups: _Groups, timeline: _Timeline, stored: set[int]) -> None:
    """One update of a slice: rounded as the state it came from, and in place where that is safe."""
    slots = {name: slot for name, slot, _ in step.dynamic}
    x, out = slots.get("x"), step.outputs[0].slot
    if x is None:
        return
    if x in stored:
        stored.add(out)
        step.rounds_update = True
    group = groups.of(x)
    if group.last_use > i or "update" not in slots or slots["update"] in group.slots:
        return
    # The one state that may share the memory, if there is one, must next become the result.
    if group.foreign:
        (state, *more) = group.foreign
        if more or not timeline.becomes(state, out, i):
            return
    step.fixed["in_place"] = InPlace.YES
    groups.join(x, out)
