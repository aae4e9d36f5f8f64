"""How MLX holds integers: in groups of 32, 64 or 128 columns, each with a scale and a bias.

MLX computes `scale * q + bias` where ours is `(q - zero_point) * scale`, so the integers are the same ones
and `bias = -scale * zero_point`. A zero point in the middle is a power of two, so that product is exact in
float16. Any other has up to eight bits, and float16 rounds the product to eleven.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from fastvlm_convert.io_names import FloatName
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme, Scheme
from fastvlm_convert.quantized.weight import (
    AffineSource,
    MixedSource,
    QuantizedWeight,
    StoredWeight,
    without_palettes,
)
from fastvlm_convert.weights.parts import part_of

GROUP_SIZES: Final = (32, 64, 128)


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer that a recipe stores as integers.

    Attributes:
        layer: Canonical name.
        columns: Weights of one output channel.
        scheme: How.
    """

    layer: str
    columns: int
    scheme: Scheme


def planned_layers(plans: Iterable[LayerPlan]) -> list[QuantizedLayer]:
    """Those of a plan."""
    return [QuantizedLayer(p.layer, p.columns, p.scheme) for p in plans if p.scheme is not None]


def stored_layers(weights: MixedSource) -> list[QuantizedLayer]:
    """Those of a source of weights."""
    return [
        QuantizedLayer(name.removesuffix(".weight"), weight.columns, weight.scheme)
        for name, weight in weights.items()
        if isinstance(weight, StoredWeight)
    ]


def group_size(layer: QuantizedLayer, allowed: Iterable[int] = GROUP_SIZES) -> int | None:
    """The size of the groups that hold a layer's integers, or None where it is stored in float.

    Convolutions of MLX take no integers, so the encoder is in float.

    Args:
        layer: The layer.
        allowed: Sizes to choose from.
    """
    scheme = layer.scheme
    if not isinstance(scheme, AffineScheme) or part_of(layer.layer) == "vision":
        return None
    if scheme.block_size is None:  # a scale of a whole row is that of each of its groups
        return max((size for size in allowed if layer.columns % size == 0), default=None)
    return scheme.block_size if scheme.block_size in allowed else None


def shared_group_size(layers: Iterable[QuantizedLayer]) -> int | None:
    """The largest size that all layers which MLX can hold as integers can have; None if there is none."""
    held = [layer for layer in layers if group_size(layer) is not None]
    fitting = (size for size in GROUP_SIZES if all(group_size(layer, (size,)) for layer in held))
    return max(fitting, default=None) if held else None


def in_groups(weights: MixedSource, allowed: Iterable[int] = GROUP_SIZES) -> AffineSource:
    """A view in which integers lie in MLX's groups; those that cannot are the floats that they stand for.

    Args:
        weights: Canonical names.
        allowed: Sizes to choose from.

    Raises:
        TargetError: A weight is a palette.
    """
    held = dict(without_palettes(weights))
    for name, weight in held.items():
        if isinstance(weight, QuantizedWeight):
            layer = QuantizedLayer(name.removesuffix(".weight"), weight.columns, weight.scheme)
            size = group_size(layer, allowed)
            held[name] = weight.dense() if size is None else _regrouped(weight, size)
    return held


def scale_dtype(scheme: AffineScheme, compute: FloatName, is_table: bool) -> FloatName:
    """Dtype of scales and biases: float16, unless that would round what is computed in float32.

    Args:
        scheme: With zero points, biases are rounded.
        compute: Dtype of the arithmetic.
        is_table: Whether rows are looked up, which MLX turns into floats of this dtype.
    """
    return compute if is_table or not scheme.symmetric else "float16"


def biases(matrix: AffineMatrix, dtype: FloatName) -> np.ndarray:
    """What MLX adds to `scale * q`, in a dtype; [rows, groups]."""
    exact = matrix.scale.astype(np.float32) * -matrix.zero_point.astype(np.float32)
    rounded: np.ndarray = exact.astype(dtype)
    return rounded


def _regrouped(weight: QuantizedWeight, size: int) -> QuantizedWeight:
    """The same integers; a scale of a whole row stands once for each of its groups."""
    if weight.scheme.block_size == size:
        return weight
    scheme = AffineScheme(weight.scheme.bits, size, weight.scheme.symmetric)
    count = weight.columns // size

    def read(start: int, stop: int) -> AffineMatrix:
        rows = weight.read(start, stop)
        return AffineMatrix(
            scheme, rows.q, np.repeat(rows.scale, count, axis=1), np.repeat(rows.zero_point, count, axis=1)
        )

    return QuantizedWeight(weight.shape, scheme, read)
