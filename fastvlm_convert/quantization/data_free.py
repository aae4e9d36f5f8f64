"""Quantize a model's weights as a plan says: some rows at a time, when they are read.

Rows of an affine weight and groups of a palette do not depend on each other, so reading a weight once, in
pieces or whole, solves it once, and only a piece is in memory. What was found is kept in the user's cache
(`tiles`).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fastvlm_convert.arithmetic import num_elements
from fastvlm_convert.quantization.palettes import palettize
from fastvlm_convert.quantization.search import quantize_affine
from fastvlm_convert.quantization.tiles import by_tiles
from fastvlm_convert.quantized.codec import affine_matrix, palette_matrix
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
    def solve(matrix: np.ndarray) -> AffineMatrix:
        return quantize_affine(matrix, scheme)

    def restore(tensors: Mapping[str, np.ndarray]) -> AffineMatrix:
        return affine_matrix(tensors, scheme, columns)

    columns = num_elements(weight.shape[1:])
    return QuantizedWeight(weight.shape, scheme, by_tiles(weight, scheme, solve, restore))


def _clustered(weight: Weight, scheme: PaletteScheme) -> PaletteWeight:
    def solve(matrix: np.ndarray) -> PaletteMatrix:
        return palettize(matrix, scheme)

    def restore(tensors: Mapping[str, np.ndarray]) -> PaletteMatrix:
        return palette_matrix(tensors, scheme, columns)

    columns = num_elements(weight.shape[1:])
    return PaletteWeight(weight.shape, scheme, by_tiles(weight, scheme, solve, restore))
