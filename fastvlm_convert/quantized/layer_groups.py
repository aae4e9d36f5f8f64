"""Plans of layers, summarized in groups that people know."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.schemes import AffineScheme, Scheme
from fastvlm_convert.recipe_settings import Solver
from fastvlm_convert.weights.parts import PARTS, Part, part_of

_MODULES = (  # part of a layer's name -> what people call its group
    (".self_attn.", "attention q/k/v/o"),
    (".mlp.", "mlp gate/up/down"),
    (".attention.", "attention qkv/proj"),
)


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one kind that are stored the same way.

    Attributes:
        component: The part of the model that they belong to.
        kind: Kind of the layers.
        plans: The layers, one at least.
    """

    component: Part
    kind: str
    plans: tuple[LayerPlan, ...]

    @property
    def scheme(self) -> Scheme | None:
        """How they are stored, None for float."""
        return self.plans[0].scheme

    @property
    def solver(self) -> Solver | None:
        """What finds their integers or tables, None for float."""
        return self.plans[0].solver if self.scheme else None

    @property
    def reason(self) -> str | None:
        """Why they stay in float, or have smaller blocks or groups than their rule says; else None."""
        return self.plans[0].reason

    @property
    def num_weights(self) -> int:
        """Weights of all of them."""
        return sum(plan.size for plan in self.plans)

    @property
    def stored_bits(self) -> int:
        """Bits of all of them in a file: scales, zero points and tables included."""
        return sum(plan.stored_bits for plan in self.plans)


def kind_of(plan: LayerPlan) -> str:
    """What people call layers of this kind."""
    part = part_of(plan.layer)
    if part in ("head", "embedding"):
        return "table"
    if part == "projector":
        return "linears fc1/fc2"
    for module, kind in _MODULES:
        if module in plan.layer:
            return kind
    if plan.shape[2:] == (1, 1):
        return "1x1 convolutions"
    return "depthwise convolutions" if plan.shape[1] == 1 else "other convolutions"


def group_layers(plans: Sequence[LayerPlan]) -> tuple[LayerGroup, ...]:
    """Layers of one kind that are stored the same way, by component, in the order of the first of each."""
    groups: dict[tuple[object, ...], list[LayerPlan]] = {}
    for plan in plans:
        treatment = (part_of(plan.layer), kind_of(plan), plan.scheme, plan.solver, plan.reason)
        groups.setdefault(treatment, []).append(plan)
    found = [LayerGroup(part_of(p[0].layer), kind_of(p[0]), tuple(p)) for p in groups.values()]
    return tuple(sorted(found, key=lambda group: PARTS.index(group.component)))


def scheme_name(scheme: Scheme | None) -> str | None:
    """A scheme in a word: `int4/32`, `int8`, `palette4/16`; None for float."""
    if isinstance(scheme, AffineScheme):
        return f"int{scheme.bits}" + ("" if scheme.block_size is None else f"/{scheme.block_size}")
    return None if scheme is None else f"palette{scheme.bits}/{scheme.group_size}"
