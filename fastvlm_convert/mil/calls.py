"""Planning one operation of the table: which of its inputs are fixed, and which are read in every run."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from fastvlm_convert.mil.constants import Constant
from fastvlm_convert.mil.ops.table import GIVEN_BY_PLAN, InPlace, Kind, Limit, Op
from fastvlm_convert.mil.readers import CONSTANT_KINDS, READERS, read_constant
from fastvlm_convert.mil.scope import Ref, Site
from fastvlm_convert.mil.steps import CallStep, round_half
from fastvlm_convert.mil.types import FLOAT16, FLOAT32, TensorType, shape_text

# No result may have more elements (2 GiB in float32), and one whose shape is not declared half of it.
_MAX_ELEMENTS: Final = 1 << 29
_MAX_FLEXIBLE_ELEMENTS: Final = 1 << 28


@dataclass
class _Bound:
    """The inputs of an operation, as `CallStep` holds them."""

    fixed: dict[str, Any]
    dynamic: list[tuple[str, int, Callable[[torch.Tensor], Any] | None]] = field(default_factory=list)
    lists: list[tuple[str, tuple[int | Constant, ...]]] = field(default_factory=list)
    pending: list[tuple[str, Constant]] = field(default_factory=list)

    def reads(self) -> tuple[int, ...]:
        """All slots that are read."""
        items = (r for _, refs in self.lists for r in refs if isinstance(r, int))
        return (*(slot for _, slot, _ in self.dynamic), *items)

    def reads_constant(self) -> bool:
        """Whether a tensor among the inputs is a constant, whose memory the result may share."""
        return bool(self.pending) or any(isinstance(r, Constant) for _, refs in self.lists for r in refs)


def plan_call(op: Op, site: Site) -> CallStep:
    """Plan an operation of the table.

    Raises:
        BundleError: It has an input too many or too few, or one of a wrong kind.
    """
    _check_inputs(op, site)
    bound = _Bound(_given_by_plan(op, site))
    for key, refs in site.arguments.items():
        if refs:
            _bind(op.parameters[key].kind, key, refs, site, bound)
    outputs = tuple(site.output(i, moves=op.moves, plain=op.plain) for i in range(len(site.message.outputs)))
    return CallStep(
        name=site.name,
        type=op.name,
        moves=op.moves,
        function=op.function,
        fixed=bound.fixed,
        dynamic=tuple(bound.dynamic),
        lists=tuple(bound.lists),
        pending=bound.pending,
        outputs=outputs,
        reads=bound.reads(),
        place=site.scope.function.name,
        reads_constant=bound.reads_constant(),
    )


def _check_inputs(op: Op, site: Site) -> None:
    unknown = sorted(set(site.arguments) - set(op.inputs))
    missing = sorted(p.name for p in op.inputs.values() if p.required and not site.arguments.get(p.name))
    if unknown or missing:
        wrong = [f"has no input '{n[:40]}'" for n in unknown] + [f"lacks its input '{n}'" for n in missing]
        raise site.error(" and ".join(wrong[:3]))
    if not site.message.outputs:
        raise site.error("has no results")


def _bind(kind: Kind, key: str, refs: list[Ref], site: Site, bound: _Bound) -> None:
    place = f"{site.what}, input '{key}'"
    if kind is Kind.TENSORS:
        bound.lists.append((key, tuple(site.scope.value(r, place) for r in refs)))
    elif kind is Kind.DIMENSIONS or (len(refs) > 1 and kind in READERS):
        bound.fixed[key] = site.plain(refs, kind, key)
    elif len(refs) > 1:
        raise site.scope.function.error(f"{place} takes one value, {len(refs)} are given")
    else:
        ref = site.scope.value(refs[0], place)
        if isinstance(ref, int):
            if kind in CONSTANT_KINDS and kind not in READERS:
                raise site.scope.function.error(f"{place} takes a constant")
            bound.dynamic.append((key, ref, READERS.get(kind)))
        elif kind in CONSTANT_KINDS:
            bound.fixed[key] = read_constant(ref, kind, place)
        else:
            bound.pending.append((key, ref))


def _given_by_plan(op: Op, site: Site) -> dict[str, Any]:
    """Parameters that are no inputs of the operation."""
    types = site.types()
    half = site.scope.function.rounds and any(t is not None and t.element is FLOAT16 for t in types)
    values = {
        Kind.ROUNDING: round_half if half else None,
        Kind.LIMIT: Limit(max(_elements(t, site) for t in types)),
        Kind.TARGET: FLOAT32 if types[0] is None else types[0].element,
        Kind.IN_PLACE: InPlace.NO,
    }
    return {p.name: values[p.kind] for p in op.parameters.values() if p.kind in GIVEN_BY_PLAN}


def _elements(declared: TensorType | None, site: Site) -> int:
    shape = None if declared is None else declared.fixed_shape
    if shape is None:
        return _MAX_FLEXIBLE_ELEMENTS
    if math.prod(shape) > _MAX_ELEMENTS:
        raise site.error(f"declares a result of shape {shape_text(shape)}, more than can be run")
    return max(math.prod(shape), 1)
