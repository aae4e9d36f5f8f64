"""What a recipe does to every layer, decided from dimensions alone: no weight is read."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import gcd
from typing import Any, Literal

from fastvlm_convert.arithmetic import num_elements
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.io_names import FloatName
from fastvlm_convert.quantized.schemes import AffineScheme, PaletteScheme, Scheme
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.recipe_settings import BLOCK_SIZES, QuantizeRule, SchemeName, Solver
from fastvlm_convert.weights.parts import input_group_of, is_language, part_of

_FLOAT_BITS: dict[FloatName, int] = {"float32": 32, "float16": 16}


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer's weight.

    Attributes:
        layer: Name without `.weight`.
        shape: Dimensions.
        scheme: Its scheme; None keeps it in float.
        solver: What finds its integers; meaningless in float.
        reason: Why it stays in float, or has smaller blocks or groups than its rule says; else None.
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
        return num_elements(self.shape)

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
        RecipeError: A layer has no rule, a rule fits no layer, a block or group size does not fit a layer
            whose rule calls that an error, or layers that are stored together would get different schemes.
    """
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) > 1
    }
    plans = tuple(_plan(layer, layers, recipe) for layer in layers)
    for rule in recipe.quantize:
        if not any(rule.fits(layer) for layer in layers):
            guesses = " and ".join(f"'{pattern}'" for pattern in _corrected(rule, layers))
            question = f"did you mean {guesses}? " if guesses else ""
            raise RecipeError(f"quantize: '{rule}' fits no layer", hint=f"{question}{_examples(layers)}")
    check_groups(plans)
    return plans


def float_storage(name: str, recipe: Recipe) -> FloatName:
    """Dtype in which a recipe stores the floats of a layer or of one of its tensors."""
    if part_of(name) == "embedding":
        return recipe.embed.storage
    return recipe.decoder.storage if is_language(name) else recipe.vision.storage


def _plan(layer: str, layers: Mapping[str, tuple[int, ...]], recipe: Recipe) -> LayerPlan:
    shape, storage = layers[layer], float_storage(layer, recipe)
    size = num_elements(shape)

    def keep(reason: str | None) -> LayerPlan:
        return LayerPlan(layer, shape, None, "search", reason, size * _FLOAT_BITS[storage])

    if not recipe.quantize:
        return keep(None)
    rule = next((r for r in recipe.quantize if r.fits(layer)), None)
    if rule is None:
        raise RecipeError(
            f"quantize: no rule fits layer '{layer}'", hint="add a last rule: {layers: ['*'], scheme: float}"
        )
    asked = scheme_of(rule.scheme, rule.block_size, rule.symmetric, rule.group_size, rule.channel_scale)
    if asked is None:
        return keep(f"rule '{rule}'")
    scheme, reason = _fitted(layer, layers, rule, asked)
    if scheme is None:
        return keep(reason)
    if rule.solver != "search" and (problem := _unsolvable(layer, shape)) is not None:
        raise RecipeError(
            f"quantize: '{rule}' fits layer '{layer}', but solver {rule.solver} needs {problem}",
            hint="give such layers a rule with solver: search before this one",
        )
    return LayerPlan(
        layer, shape, scheme, rule.solver, reason, scheme.stored_bits(shape[0], size // shape[0])
    )


def _fitted(
    layer: str, layers: Mapping[str, tuple[int, ...]], rule: QuantizeRule, asked: Scheme
) -> tuple[Scheme | None, str | None]:
    """The scheme of a layer whose rule asks for one, or None for float; and why it is not the one asked for.

    Raises:
        RecipeError: Blocks or groups do not fit the layer, and its rule calls that an error.
    """
    if isinstance(asked, PaletteScheme):
        problem = _ragged_together(layer, layers, asked.group_size)
    else:
        problem = indivisible(layers[layer], asked.block_size)
    if problem is None:
        return asked, None
    if rule.on_indivisible == "error":
        raise RecipeError(
            f"quantize: '{rule}' fits layer '{layer}', but {problem}",
            hint=f"choose another {'group_size' if rule.is_palette else 'block_size'}, "
            "or set on_indivisible to smaller or float",
        )
    if rule.on_indivisible == "float":
        return None, problem
    if isinstance(asked, PaletteScheme):
        common = gcd(*(layers[other][0] for other in _stored_together(layer, layers)))
        group_size = max(size for size in range(1, asked.group_size) if common % size == 0)
        return replace(asked, group_size=group_size), f"{problem}, so {group_size}"
    return _in_smaller_blocks(layer, layers[layer], asked, problem)


def _in_smaller_blocks(
    layer: str, shape: tuple[int, ...], asked: AffineScheme, problem: str
) -> tuple[Scheme | None, str]:
    """The largest block that fits, then the whole row, but for layers that work on tokens.

    ONNX Runtime's operators for these (MatMulNBits, GatherBlockQuantized) need blocks of 16 at least. The
    plan does not depend on targets, because all of them get the same integers; so it is float for all.
    """
    fitting = [size for size in BLOCK_SIZES if indivisible(shape, size) is None]
    if fitting:
        return replace(asked, block_size=max(fitting)), f"{problem}, so {max(fitting)}"
    if is_language(layer):
        smallest = BLOCK_SIZES[0]
        return None, f"{indivisible(shape, smallest)}, the smallest that ONNX Runtime takes in the decoder"
    return replace(asked, block_size=None), f"{problem}, so channel"


def _stored_together(layer: str, layers: Collection[str]) -> list[str]:
    """The layers that exporters stack with a layer, which need one scheme; itself among them."""
    group = input_group_of(layer)
    if group is None or not group.is_stacked:
        return [layer]
    return [other for other in group.layers if other in layers]


def _ragged_together(layer: str, layers: Mapping[str, tuple[int, ...]], group_size: int) -> str | None:
    """Why tables do not fit a layer and those stored with it, or None where they do."""
    if problem := ragged(layers[layer][0], group_size):
        return problem
    for other in _stored_together(layer, layers):
        rows, name = layers[other][0], other.rpartition(".")[2]
        if ragged(rows, group_size):
            return (
                f"{name}, stored with it, has {rows} output channels, no multiple of group_size {group_size}"
            )
    return None


def _unsolvable(layer: str, shape: tuple[int, ...]) -> str | None:
    """What solvers that need data miss in a layer, or None where they can solve it."""
    if len(shape) > 2 and shape[2:] != (1, 1):
        return f"a matrix or a 1x1 convolution, not one of {_kernel(shape)}"
    if part_of(layer) in ("head", "embedding"):
        return "a layer of a block, not the table of the embedding or the head"
    return None


def indivisible(shape: tuple[int, ...], block: int | None) -> str | None:
    """Why blocks do not fit a layer, or None where they do."""
    if block is None:
        return None
    if len(shape) > 2 and shape[2:] != (1, 1):
        return f"blocks do not fit a convolution of {_kernel(shape)}"
    columns = num_elements(shape[1:])
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
        group = input_group_of(layer)
        if group is None or not group.is_stacked:
            continue
        first = plans.get(group.layers[0], plan)
        if first.scheme != plan.scheme:
            raise RecipeError(
                f"quantize: '{first.layer}' and '{layer}' are stored together, so they need one scheme"
            )


def _corrected(rule: QuantizeRule, layers: Collection[str]) -> list[str]:
    """A rule's patterns with every part, as `self_attn`, replaced by the nearest that layers have.

    Those that still fit no layer are left out.
    """
    parts = sorted({part for layer in layers for part in layer.split(".") if not part.isdecimal()})
    corrected = [
        ".".join((get_close_matches(part, parts, n=1) or [part])[0] for part in pattern.split("."))
        for pattern in rule.layers
    ]
    return [p for p in corrected if any(fnmatchcase(layer, p) for layer in layers)]


def _examples(layers: Mapping[str, tuple[int, ...]]) -> str:
    names = list(layers)
    return f"layers are called {names[0]}, {names[len(names) // 2]}, {names[-1]}"
