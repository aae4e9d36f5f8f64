"""A function of a package as a list of steps: names become slots, operations are looked up once.

Everything that can be wrong with a program is found here, before anything runs: operations that nobody knows,
inputs that an operation does not have, values that nobody makes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil import ops  # fills the table  # noqa: F401
from fastvlm_convert.mil.constants import Constant, computed, constant_of
from fastvlm_convert.mil.description import FunctionSpec, function_block
from fastvlm_convert.mil.memory import plan_memory
from fastvlm_convert.mil.ops.table import (
    CONSTEXPRS,
    GIVEN_BY_PLAN,
    OPS,
    InPlace,
    Kind,
    Limit,
    Op,
    Parameter,
)
from fastvlm_convert.mil.package import Package
from fastvlm_convert.mil.readers import READERS, read_constant
from fastvlm_convert.mil.steps import (
    Block,
    CallStep,
    CondStep,
    LoopStep,
    Output,
    ReadStep,
    Step,
    WriteStep,
    round_half,
)
from fastvlm_convert.mil.types import FLOAT16, FLOAT32, Message, TensorType, tensor_type

Precision = Literal["exact", "device"]

# Operations that are no functions of their inputs alone; the others are in the table.
CONTROL: Final = frozenset({"const", "read_state", "write_state", "cond", "while_loop"})

# A result whose shape is known only when it runs may have at most this many elements (1 GiB in float32).
_MAX_FLEXIBLE_ELEMENTS: Final = 1 << 28
_MAX_DEPTH: Final = 16  # branches and loops inside of each other


@dataclass(frozen=True)
class StateRef:
    """A state; only `read_state` and `write_state` take one."""

    name: str


Ref = int | Constant | StateRef


@dataclass(frozen=True)
class Plan:
    """A function, ready to run.

    Attributes:
        spec: What it takes and gives.
        block: Its steps.
        num_slots: How many values one run holds.
        copied: Slots of outputs that share memory with states, inputs or constants.
    """

    spec: FunctionSpec
    block: Block
    num_slots: int
    copied: frozenset[int]


def knows(operation: str) -> bool:
    """Whether an operation can be run."""
    return operation in OPS or operation in CONSTEXPRS or operation in CONTROL


def plan_function(package: Package, spec: FunctionSpec, precision: Precision) -> Plan:
    """Plan a function.

    Args:
        package: Holds program and weights.
        spec: The function.
        precision: `exact` computes in float32, `device` rounds what the program declares as float16.

    Raises:
        BundleError: The program cannot be run; says which operation is why.
    """
    half = frozenset(s.name for s in spec.states if s.type.element is FLOAT16)
    planner = _Planner(package, spec.name, precision == "device", half)
    scope: dict[str, Ref] = {s.name: StateRef(s.name) for s in spec.states}
    inputs = tuple(planner.define(scope, i.name, f"input '{i.name[:80]}'") for i in spec.inputs)
    block = planner.block(function_block(package, spec.name), scope, inputs, 0)
    return Plan(spec, block, planner.num_slots, plan_memory(block, half))


class _Planner:
    def __init__(self, package: Package, function: str, rounds: bool, half_states: frozenset[str]) -> None:
        self.num_slots = 0
        self._half_states = half_states
        self._package = package
        self._function = function
        self._rounds = rounds

    def define(self, scope: dict[str, Ref], name: str, what: str) -> int:
        """A new slot for a name."""
        if name in scope:
            raise self._error(f"{what} defines '{name[:80]}' a second time")
        scope[name] = self.num_slots
        self.num_slots += 1
        return self.num_slots - 1

    def block(self, message: Message, scope: dict[str, Ref], inputs: tuple[int, ...], depth: int) -> Block:
        """Plan the operations of a block; `scope` holds what they may read and takes what they make."""
        if depth > _MAX_DEPTH:
            raise self._error("branches and loops are nested too deep")
        first = self.num_slots
        steps: list[Step] = []
        for operation in message.operations:
            step = self._operation(operation, scope, depth)
            if step is not None:
                steps.append(step)
        outputs = tuple(
            self._tensor_ref(self._look_up(name, scope, "an output"), "an output") for name in message.outputs
        )
        _free(steps, {o for o in outputs if isinstance(o, int)}, first)
        return Block(inputs, steps, outputs)

    def _operation(self, operation: Message, scope: dict[str, Ref], depth: int) -> Step | None:
        kind = operation.type
        name = operation.outputs[0].name if operation.outputs else _named(operation)
        what = f"operation '{name[:80]}' ({kind[:40]})"
        if not knows(kind):
            raise BundleError(
                f"operation '{name[:80]}' of function '{self._function[:80]}' is of the unknown type "
                f"'{kind[:80]}'",
                where=self._package.path,
                hint=f"known are {len(OPS) + len(CONSTEXPRS) + len(CONTROL)} types of iOS 15 to 18",
            )
        arguments = {
            key: [self._argument(a, scope, f"{what}, input '{key[:40]}'") for a in argument.arguments]
            for key, argument in operation.inputs.items()
        }
        if kind == "const":
            self._const(operation, scope, what)
            return None
        if kind in CONSTEXPRS:
            self._constexpr(operation, arguments, scope, what)
            return None
        if kind in OPS and kind != "read_state":
            return self._call(OPS[kind], operation, arguments, scope, name, what)
        if kind in ("read_state", "write_state"):
            return self._state(operation, arguments, scope, name, what)
        return self._control(operation, arguments, scope, name, depth)

    def _const(self, operation: Message, scope: dict[str, Ref], what: str) -> None:
        if len(operation.outputs) != 1 or "val" not in operation.attributes:
            raise self._error(f"{what} has no value")
        name = operation.outputs[0].name
        if name in scope:
            raise self._error(f"{what} defines '{name[:80]}' a second time")
        scope[name] = constant_of(self._package, operation.attributes["val"], what)

    def _constexpr(
        self,
        operation: Message,
        arguments: dict[str, list[Ref]],
        scope: dict[str, Ref],
        what: str,
    ) -> None:
        """A constant made of others. Up to iOS 16 they are attributes, afterwards inputs."""
        given: dict[str, Constant] = {
            key: constant_of(self._package, value, f"{what}, attribute '{key[:40]}'")
            for key, value in operation.attributes.items()
            if key != "name"
        }
        for key, refs in arguments.items():
            if len(refs) != 1 or not isinstance(refs[0], Constant):
                raise self._error(f"{what} takes constants, but its input '{key[:40]}' is none")
            given[key] = refs[0]
        for i, output in enumerate(operation.outputs):
            if output.name in scope:
                raise self._error(f"{what} defines '{output.name[:80]}' a second time")
            declared = tensor_type(output.type, what)
            element = FLOAT32 if declared is None else declared.element
            scope[output.name] = computed(CONSTEXPRS[operation.type], given, i, what, element)

    def _call(
        self,
        op: Op,
        operation: Message,
        arguments: dict[str, list[Ref]],
        scope: dict[str, Ref],
        name: str,
        what: str,
    ) -> CallStep:
        unknown = sorted(set(arguments) - set(op.inputs))
        missing = sorted(p.name for p in op.inputs.values() if p.required and not arguments.get(p.name))
        if unknown or missing:
            wrong = [f"has no input '{n[:40]}'" for n in unknown] + [
                f"lacks its input '{n}'" for n in missing
            ]
            raise self._error(f"{what} {' and '.join(wrong[:3])}")
        if not operation.outputs:
            raise self._error(f"{what} has no results")
        types = [tensor_type(o.type, what) for o in operation.outputs]
        fixed = self._given_by_plan(op, types)
        dynamic: list[tuple[str, int, Callable[[torch.Tensor], Any] | None]] = []
        lists: list[tuple[str, tuple[int | Constant, ...]]] = []
        pending: list[tuple[str, Constant]] = []
        reads: list[int] = []
        for key, refs in arguments.items():
            parameter, place = op.parameters[key], f"{what}, input '{key}'"
            if parameter.kind is Kind.TENSORS:
                items = tuple(self._tensor_ref(r, place) for r in refs)
                lists.append((key, items))
                reads += [r for r in items if isinstance(r, int)]
            elif len(refs) > 1 and parameter.kind in READERS:
                fixed[key] = tuple(self._plain(r, parameter, place) for r in refs)
            elif len(refs) == 1:
                ref = self._tensor_ref(refs[0], place)
                if isinstance(ref, int):
                    dynamic.append((key, ref, READERS.get(parameter.kind)))
                    reads.append(ref)
                elif parameter.kind in READERS or parameter.kind in (Kind.STR, Kind.STRINGS):
                    fixed[key] = read_constant(ref, parameter.kind, place)
                else:
                    pending.append((key, ref))
            elif refs:
                raise self._error(f"{place} takes one value, {len(refs)} are given")
        outputs = tuple(
            self._output(o, t, scope, what, op.moves) for o, t in zip(operation.outputs, types, strict=True)
        )
        return CallStep(
            name=name,
            type=op.name,
            moves=op.moves,
            function=op.function,
            fixed=fixed,
            dynamic=tuple(dynamic),
            lists=tuple(lists),
            pending=pending,
            outputs=outputs,
            reads=tuple(reads),
            place=self._function,
            reads_constant=bool(pending) or any(isinstance(i, Constant) for _, items in lists for i in items),
        )

    def _given_by_plan(self, op: Op, types: list[TensorType | None]) -> dict[str, Any]:
        """Parameters that are no inputs of the operation."""
        first = types[0]
        half = self._rounds and any(t is not None and t.element is FLOAT16 for t in types)
        values = {
            Kind.ROUNDING: round_half if half else None,
            Kind.LIMIT: Limit(max(map(_elements, types))),
            Kind.TARGET: FLOAT32 if first is None else first.element,
            Kind.IN_PLACE: InPlace.NO,
        }
        return {p.name: values[p.kind] for p in op.parameters.values() if p.kind in GIVEN_BY_PLAN}

    def _state(
        self,
        operation: Message,
        arguments: dict[str, list[Ref]],
        scope: dict[str, Ref],
        name: str,
        what: str,
    ) -> Step:
        state = arguments.get("input", [None])[:1]
        if not state or not isinstance(state[0], StateRef):
            raise self._error(f"{what} needs a state as its input")
        if operation.type == "read_state":
            if len(operation.outputs) != 1:
                raise self._error(f"{what} has {len(operation.outputs)} results")
            output = self._output(operation.outputs[0], None, scope, what, True)
            return ReadStep(name, state[0].name, (output,))
        data = arguments.get("data", [])
        if len(data) != 1:
            raise self._error(f"{what} needs one value to write")
        ref = self._tensor_ref(data[0], what)
        reads = (ref,) if isinstance(ref, int) else ()
        rounds = state[0].name in self._half_states
        return WriteStep(name, state[0].name, ref, rounds, self._function, reads=reads)

    def _control(
        self,
        operation: Message,
        arguments: dict[str, list[Ref]],
        scope: dict[str, Ref],
        name: str,
        depth: int,
    ) -> Step:
        what = f"operation '{name[:80]}' ({operation.type})"
        if len(operation.blocks) != 2:
            raise self._error(f"{what} has {len(operation.blocks)} blocks")
        is_loop = operation.type == "while_loop"
        key = "loop_vars" if is_loop else "pred"
        refs = tuple(self._tensor_ref(r, what) for r in arguments.get(key, []))
        if set(arguments) - {key} or (not is_loop and len(refs) != 1):
            raise self._error(f"{what} takes '{key}', but {sorted(arguments)[:4]} are given")
        blocks = []
        for message in operation.blocks:
            inner = dict(scope)
            slots = tuple(self.define(inner, v.name, what) for v in message.inputs)
            blocks.append(self.block(message, inner, slots, depth + 1))
        wanted = len(refs) if is_loop else 0
        if any(len(b.inputs) != wanted for b in blocks) or (is_loop and len(blocks[1].outputs) != wanted):
            raise self._error(f"{what} has blocks that take or give other than {wanted} values")
        if is_loop and len(blocks[0].outputs) != 1:
            raise self._error(f"{what} has a condition of {len(blocks[0].outputs)} values")
        reads = {r for r in refs if isinstance(r, int)}
        for block in blocks:
            reads |= {s for step in block.steps for s in step.reads} | {
                o for o in block.outputs if isinstance(o, int)
            }
        known = tuple(r for r in sorted(reads) if r in set(scope.values()))
        outputs = tuple(self._output(o, None, scope, what, True) for o in operation.outputs)
        if is_loop:
            return LoopStep(name, blocks[0], blocks[1], refs, outputs, known, self._function)
        return CondStep(name, refs[0], (blocks[0], blocks[1]), outputs, known, self._function)

    def _output(
        self,
        message: Message,
        declared: TensorType | None,
        scope: dict[str, Ref],
        what: str,
        moves: bool,
    ) -> Output:
        slot = self.define(scope, message.name, what)
        if declared is None:
            return Output(slot, message.name, None, False)
        rounds = self._rounds and declared.element is FLOAT16 and not moves
        return Output(slot, message.name, declared.fixed_shape, rounds)

    def _argument(self, binding: Message, scope: dict[str, Ref], what: str) -> Ref:
        if binding.WhichOneof("binding") == "value":
            return constant_of(self._package, binding.value, what)
        return self._look_up(binding.name, scope, what)

    def _look_up(self, name: str, scope: dict[str, Ref], what: str) -> Ref:
        if name not in scope:
            raise self._error(f"{what} reads '{name[:80]}', which no operation before it makes")
        return scope[name]

    def _tensor_ref(self, ref: Ref, what: str) -> int | Constant:
        if isinstance(ref, StateRef):
            raise self._error(f"{what} takes a value, not the state '{ref.name[:80]}'; read it first")
        return ref

    def _plain(self, ref: Ref, parameter: Parameter, what: str) -> Any:  # noqa: ANN401
        if not isinstance(ref, Constant):
            raise self._error(f"{what} takes constants")
        values = read_constant(ref, parameter.kind, what)
        if not isinstance(values, tuple) or len(values) != 1:
            raise self._error(f"{what} takes single values")
        return values[0]

    def _error(self, what: str) -> BundleError:
        return BundleError(f"{what}, in function '{self._function[:80]}'", where=self._package.path)


def _named(operation: Message) -> str:
    """Name of an operation without results: its attribute."""
    value = operation.attributes.get("name")
    texts = list(value.immediateValue.tensor.strings.values) if value is not None else []
    return texts[0] if texts else "without a name"


def _free(steps: list[Step], kept: set[int], first: int) -> None:
    """Let each slot of this block go after the last step that reads it."""
    seen = set(kept)
    for step in reversed(steps):
        slots = {*step.reads, *(o.slot for o in step.outputs)}
        step.frees = tuple(s for s in sorted(slots - seen) if s >= first)
        seen |= slots


def _elements(declared: TensorType | None) -> int:
    shape = None if declared is None else declared.fixed_shape
    return _MAX_FLEXIBLE_ELEMENTS if shape is None else max(math.prod(shape), 1)
