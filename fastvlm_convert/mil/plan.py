"""A function of a package as a list of steps: names become slots, operations are looked up once.

Everything that can be wrong with a program is found here, before anything runs: operations that nobody knows,
inputs that an operation does not have, values that nobody makes.
"""

from dataclasses import dataclass
from typing import Final, Literal

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil import ops  # fills the table  # noqa: F401
from fastvlm_convert.mil.calls import plan_call
from fastvlm_convert.mil.constants import Constant, computed, constant_of
from fastvlm_convert.mil.description import MAX_OPERATIONS, FunctionSpec, check_count, function_block
from fastvlm_convert.mil.footprint import footprint
from fastvlm_convert.mil.memory import plan_memory
from fastvlm_convert.mil.ops.table import CONSTEXPRS, OPS, UNSUPPORTED
from fastvlm_convert.mil.package import Package
from fastvlm_convert.mil.scope import FunctionPlan, Scope, Site, StateRef
from fastvlm_convert.mil.steps import Block, CondStep, LoopStep, ReadStep, Step, WriteStep
from fastvlm_convert.mil.types import FLOAT16, Message

Precision = Literal["exact", "device"]

# Operations that are no functions of their inputs alone; the others are in the table.
CONTROL: Final = frozenset({"const", "read_state", "write_state", "cond", "while_loop"})

_MAX_DEPTH: Final = 16  # branches and loops inside of each other


@dataclass(frozen=True)
class Plan:
    """A function, ready to run.

    Attributes:
        spec: What it takes and gives.
        block: Its steps.
        num_slots: How many values one run holds.
        copied: Slots of outputs that share memory with states, inputs or constants.
        needed_bytes: Memory that it takes to run, by the shapes it declares.
    """

    spec: FunctionSpec
    block: Block
    num_slots: int
    copied: frozenset[int]
    needed_bytes: int


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
    function = FunctionPlan(package, spec.name, precision == "device", half)
    scope = Scope(function)
    for state in spec.states:
        scope.define(state.name, StateRef(state.name), f"state '{state.name[:80]}'")
    inputs = tuple(scope.define_slot(i.name, f"input '{i.name[:80]}'") for i in spec.inputs)
    block = _plan_block(function_block(package, spec.name), scope, inputs, 0)
    needed = footprint(block, spec, function.constants.values())
    return Plan(spec, block, function.num_slots, plan_memory(block, half), needed)


def _plan_block(message: Message, scope: Scope, inputs: tuple[int, ...], depth: int) -> Block:
    """Plan the operations of a block; `scope` holds what they may read and takes what they make."""
    if depth > _MAX_DEPTH:
        raise scope.function.error("branches and loops are nested too deep")
    function = scope.function
    function.num_operations += len(message.operations)
    check_count(function.num_operations, MAX_OPERATIONS, "the function has {} operations", function.package)
    first = function.num_slots
    planned = (_plan_operation(operation, scope, depth) for operation in message.operations)
    steps = [step for step in planned if step is not None]
    outputs = tuple(scope.value(scope.look_up(o, "an output"), "an output") for o in message.outputs)
    _free(steps, {o for o in outputs if isinstance(o, int)}, first)
    return Block(inputs, steps, outputs)


def _plan_operation(message: Message, scope: Scope, depth: int) -> Step | None:
    """The step of an operation, or None if it only defines a constant."""
    kind = message.type
    site = Site.of(message, scope)
    if not knows(kind):
        raise BundleError(
            f"operation '{site.name[:80]}' of function '{scope.function.name[:80]}' is of the unknown type "
            f"'{kind[:80]}'",
            where=scope.function.package.path,
            hint=UNSUPPORTED.get(
                kind, f"{len(OPS.keys() | CONSTEXPRS.keys() | CONTROL)} types of iOS 15 to 18 are known"
            ),
        )
    if kind == "const":
        _define_constant(site)
        return None
    if kind in CONSTEXPRS:
        _define_computed(site)
        return None
    if kind in ("read_state", "write_state"):
        return _plan_state(site)
    if kind in CONTROL:
        return _plan_control(site, depth)
    return plan_call(OPS[kind], site)


def _define_constant(site: Site) -> None:
    message = site.message
    if len(message.outputs) != 1 or "val" not in message.attributes:
        raise site.error("has no value")
    constant = constant_of(site.scope.function.package, message.attributes["val"], site.what)
    site.scope.define(site.name, constant, site.what)


def _define_computed(site: Site) -> None:
    """A constant made of others. Up to iOS 16 they are attributes, afterwards inputs."""
    given: dict[str, Constant] = {
        key: constant_of(site.scope.function.package, value, f"{site.what}, attribute '{key[:40]}'")
        for key, value in site.message.attributes.items()
        if key != "name"
    }
    for key, refs in site.arguments.items():
        if len(refs) != 1 or not isinstance(refs[0], Constant):
            raise site.error(f"takes constants, but its input '{key[:40]}' is none")
        given[key] = refs[0]
    function = CONSTEXPRS[site.message.type]
    for i, (output, declared) in enumerate(zip(site.message.outputs, site.types(), strict=True)):
        site.scope.define(output.name, computed(function, given, i, site.what, declared), site.what)


def _plan_state(site: Site) -> Step:
    state = site.arguments.get("input", [])
    if len(state) != 1 or not isinstance(state[0], StateRef):
        raise site.error("needs a state as its input")
    if site.message.type == "read_state":
        if len(site.message.outputs) != 1:
            raise site.error(f"has {len(site.message.outputs)} results")
        return ReadStep(site.name, state[0].name, (site.output(0, moves=True),))
    data = site.arguments.get("data", [])
    if len(data) != 1:
        raise site.error("needs one value to write")
    function = site.scope.function
    ref = site.scope.value(data[0], site.what)
    reads = (ref,) if isinstance(ref, int) else ()
    return WriteStep(
        site.name, state[0].name, ref, state[0].name in function.half_states, function.name, reads=reads
    )


def _plan_control(site: Site, depth: int) -> Step:
    message, scope = site.message, site.scope
    if len(message.blocks) != 2:
        raise site.error(f"has {len(message.blocks)} blocks")
    is_loop = message.type == "while_loop"
    key = "loop_vars" if is_loop else "pred"
    refs = tuple(scope.value(r, site.what) for r in site.arguments.get(key, []))
    if set(site.arguments) - {key} or (not is_loop and len(refs) != 1):
        raise site.error(
            f"takes '{key}', but {', '.join(sorted(site.arguments))[:160] or 'nothing'} is given"
        )
    outside = set(scope.names.values())
    blocks = []
    for block in message.blocks:
        inner = scope.inner()
        slots = tuple(inner.define_slot(v.name, site.what) for v in block.inputs)
        blocks.append(_plan_block(block, inner, slots, depth + 1))
    wanted = len(refs) if is_loop else 0
    if any(len(b.inputs) != wanted for b in blocks) or (is_loop and len(blocks[1].outputs) != wanted):
        raise site.error(f"has blocks that take or give other than {wanted} values")
    if is_loop and len(blocks[0].outputs) != 1:
        raise site.error(f"has a condition of {len(blocks[0].outputs)} values")
    reads = {r for r in refs if isinstance(r, int)}
    for planned in blocks:
        reads |= {s for step in planned.steps for s in step.reads}
        reads |= {o for o in planned.outputs if isinstance(o, int)}
    known = tuple(r for r in sorted(reads) if r in outside)
    outputs = tuple(site.output(i, moves=True) for i in range(len(message.outputs)))
    place = scope.function.name
    if is_loop:
        return LoopStep(site.name, blocks[0], blocks[1], refs, outputs, known, place)
    return CondStep(site.name, refs[0], (blocks[0], blocks[1]), outputs, known, place)


def _free(steps: list[Step], kept: set[int], first: int) -> None:
    """Let each slot of this block go after the last step that reads it."""
    seen = set(kept)
    for step in reversed(steps):
        slots = {*step.reads, *(o.slot for o in step.outputs)}
        step.frees = tuple(s for s in sorted(slots - seen) if s >= first)
        seen |= slots
