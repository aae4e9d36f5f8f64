"""What a recipe does to every layer, decided from dimensions alone: no weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastvlm_convert.errors import RecipeError
from fastvlm_convert.io_names import FloatName
from fastvlm_convert.quantized.schemes import AffineScheme, PaletteScheme, Scheme
from fastvlm_convert.recipe import Recipe, SchemeName, Solver

_FLOAT_BITS: dict[FloatName, int] = {"float32": 32, "float16": 16}
_GROUPS = (("q_proj", "k_proj", "v_proj"),)  # exporters stack these, so their schemes must be equal
_TABLES = ("decoder.embed_tokens", "decoder.lm_head")


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer's weight.

    Attributes:
        layer: Name without `.weight`.
        shape: Dimensions.
        scheme: Its scheme; None keeps it in float.
        solver: What finds its integers; meaningless in float.
        reason: Why it stays in float, or None.
        stored_bits: Bits of it in a file.
    """

    layer: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    solver: Solver
    reason: str | None
    stored_bits: int

    @property
    def size(self) -> int:
        """Number of weights."""
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def columns(self) -> int:
        """Weights of one output channel."""
        return self.size // self.shape[0]


def plan_layers(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> tuple[LayerPlan, ...]:
    """Decide the scheme of every matrix and convolution.

    Args:
        shapes: Weight name -> shape, folded.
        recipe: Its `quantize` rules.

    Raises:
        RecipeError: A layer has no rule, a block size does not divide its width, a rule fits no layer, or
            layers that are stored together would get different schemes.
    """
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) > 1
    }
    plans = tuple(_plan(layer, shape, recipe) for layer, shape in layers.items())
    for rule in recipe.quantize:
        if not any(rule.fits(layer) for layer in layers):
            raise RecipeError(f"quantize: '{rule}' fits no layer", hint=_examples(layers))
    check_groups(plans)
    return plans


def float_storage(name: str, recipe: Recipe) -> FloatName:
    """Dtype in which a recipe stores the floats of a layer or of one of its tensors."""
    if name.startswith("decoder.embed_tokens"):
        return recipe.embed.storage
    return recipe.decoder.storage if name.startswith("decoder.") else recipe.vision.storage


def _plan(layer: str, shape: tuple[int, ...], recipe: Recipe) -> LayerPlan:
    storage = float_storage(layer, recipe)
    size = 1
    for n in shape:
        size *= n

    def keep(reason: str | None) -> LayerPlan:
        return LayerPlan(layer, shape, None, "search", reason, size * _FLOAT_BITS[storage])

    if not recipe.quantize:
        return keep(None)
    rule = next((r for r in recipe.quantize if r.fits(layer)), None)
    if rule is None:
        raise RecipeError(
            f"quantize: no rule fits layer '{layer}'", hint="add a last rule: {layers: ['*'], scheme: float}"
        )
    scheme = scheme_of(rule.scheme, rule.block_size, rule.symmetric, rule.group_size, rule.channel_scale)
    if scheme is None:
        return keep(f"rule '{rule}'")
    columns = size // shape[0]
    block = None if rule.block_size == "channel" else rule.block_size
    reason = ragged(shape[0], rule.group_size) if rule.is_palette else indivisible(shape, columns, block)
    if reason is not None:
        if rule.on_indivisible == "float":
            return keep(reason)
        raise RecipeError(
            f"quantize: '{rule}' fits layer '{layer}', but {reason}",
            hint=f"choose another {'group_size' if rule.is_palette else 'block_size'}, "
            "or set on_indivisible: float",
        )
    if rule.solver != "search" and (problem := _unsolvable(layer, shape)) is not None:
        raise RecipeError(
            f"quantize: '{rule}' fits layer '{layer}', but solver {rule.solver} needs {problem}",
            hint="give such layers a rule with solver: search before this one",
        )
    return LayerPlan(layer, shape, scheme, rule.solver, None, scheme.stored_bits(shape[0], columns))


def _unsolvable(layer: str, shape: tuple[int, ...]) -> str | None:
    """What solvers that need data miss in a layer, or None where they can solve it."""
    if len(shape) > 2 and shape[2:] != (1, 1):
        return f"a matrix or a 1x1 convolution, not one of {_kernel(shape)}"
    return "a layer of a block, not the table of the embedding or the head" if layer in _TABLES else None


def indivisible(shape: tuple[int, ...], columns: int, block: int | None) -> str | None:
    """Why blocks do not fit a layer, or None where they do."""
    if block is None:
        return None
    if len(shape) > 2 and shape[2:] != (1, 1):
        return f"blocks do not fit a convolution of {_kernel(shape)}"
    return f"its width {columns} is no multiple of block_size {block}" if columns % block else None


def _kernel(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape[2:])


def ragged(rows: int, group_size: int) -> str | None:
    """Why tables do not fit a layer, or None where they do: each serves equally many output channels."""
    if rows % group_size == 0:
        return None
    return f"its {rows} output channels are no multiple of group_size {group_size}"


def scheme_of(
    name: SchemeName,
    block_size: int | Literal["channel"],
    symmetric: bool,
    group_size: int,
    channel_scale: bool,
) -> Scheme | None:
    """The scheme that the words of a rule describe; None for float."""
    if name == "float":
        return None
    bits: Any = int(name[-1])
    if name.startswith("palette"):
        return PaletteScheme(bits, group_size, channel_scale)
    return AffineScheme(bits, None if block_size == "channel" else block_size, symmetric)


def check_groups(layers: Sequence[LayerPlan]) -> None:
    """See that layers which exporters stack have one scheme.

    Raises:
        RecipeError: They have not.
    """
    plans = {plan.layer: plan for plan in layers}
    for layer, plan in plans.items():
        for first, *others in _GROUPS:
            if not layer.endswith(f".{first}"):
                continue
            for other in others:
                neighbour = plans.get(layer.replace(first, other))
                if neighbour is None:
                    raise RecipeError(f"'{layer}' has no '{other}' beside it")
                if neighbour.scheme != plan.scheme:
                    raise RecipeError(
                        f"quantize: '{layer}' and '{neighbour.layer}' are stored together, "
                        "so they need one scheme",
                        hint="give q_proj, k_proj and v_proj one rule",
                    )


def _examples(layers: Mapping[str, tuple[int, ...]]) -> str:
    names = list(layers)
    return f"layers are called {names[0]}, {names[len(names) // 2]}, {names[-1]}"
