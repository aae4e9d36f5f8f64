"""Quantize a model's weights as a plan says: some rows at a time, when they are read.

Nothing is stored. Rows of an affine weight and groups of a palette do not depend on each other, so reading a
weight once, in pieces or whole, solves it once, and only a piece is in memory.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fastvlm_convert.quantization.palettes import palettize
from fastvlm_convert.quantization.search import quantize_affine
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme, PaletteMatrix, PaletteScheme
from fastvlm_convert.quantized.weight import AnyWeight, PaletteWeight, QuantizedWeight
from fastvlm_convert.weights.source import Weight


def quantize_weights(weights: Mapping[str, Weight], plans: Sequence[LayerPlan]) -> dict[str, AnyWeight]:
    """A view in which the planned layers are integers or palettes, found by search without data.

    Args:
        weights: Canonical names, folded.
        plans: One a layer.
    """
    quantized: dict[str, AnyWeight] = dict(weights)
    for plan in plans:
        name = f"{plan.layer}.weight"
        if plan.solver != "search":
            continue
        if isinstance(plan.scheme, AffineScheme):
            quantized[name] = _searched(weights[name], plan.scheme)
        elif isinstance(plan.scheme, PaletteScheme):
            quantized[name] = _clustered(weights[name], plan.scheme)
    return quantized


def _searched(weight: Weight, scheme: AffineScheme) -> QuantizedWeight:
    def read(start: int, stop: int) -> AffineMatrix:
        return quantize_affine(_matrix(weight, start, stop), scheme)

    return QuantizedWeight(weight.shape, scheme, read)


def _clustered(weight: Weight, scheme: PaletteScheme) -> PaletteWeight:
    def read(start: int, stop: int) -> PaletteMatrix:
        return palettize(_matrix(weight, start, stop), scheme)

    return PaletteWeight(weight.shape, scheme, read)


def _matrix(weight: Weight, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop), all other axes in one; float32."""
    return np.ascontiguousarray(weight.read(start, stop).reshape(stop - start, -1), np.float32)
