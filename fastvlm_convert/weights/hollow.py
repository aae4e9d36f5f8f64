"""Weights that have shapes and schemes but no content: what predictions are made with."""

from collections.abc import Sequence

import numpy as np

from fastvlm_convert.weights.config import ModelConfig
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.names import weight_shapes
from fastvlm_convert.weights.plan import LayerPlan
from fastvlm_convert.weights.quantized import AnyWeight, MixedSource, PaletteWeight, QuantizedWeight
from fastvlm_convert.weights.schemes import AffineMatrix, AffineScheme, PaletteMatrix, PaletteScheme
from fastvlm_convert.weights.source import Weight


def hollow_weights(config: ModelConfig, plans: Sequence[LayerPlan]) -> MixedSource:
    """What the engine would give to an exporter, with zeros for numbers.

    Args:
        config: Dimensions.
        plans: Schemes of the layers.

    Returns:
        Canonical names, folded, integers or palettes where planned.
    """
    shapes = {name: _zeros(shape) for name, shape in weight_shapes(config).items()}
    weights: dict[str, AnyWeight] = {name: _zeros(weight.shape) for name, weight in fold(shapes).items()}
    for plan in plans:
        if isinstance(plan.scheme, AffineScheme):
            weights[f"{plan.layer}.weight"] = _integers(plan.shape, plan.scheme)
        elif isinstance(plan.scheme, PaletteScheme):
            weights[f"{plan.layer}.weight"] = _palette(plan.shape, plan.scheme)
    return weights


def _zeros(shape: tuple[int, ...]) -> Weight:
    def read(start: int, stop: int) -> np.ndarray:
        return np.zeros((stop - start, *shape[1:]), np.float32)

    return Weight(shape, "float32", read)


def _integers(shape: tuple[int, ...], scheme: AffineScheme) -> QuantizedWeight:
    columns = int(np.prod(shape[1:], dtype=np.int64))
    blocks = scheme.num_blocks(columns)

    def read(start: int, stop: int) -> AffineMatrix:
        rows = stop - start
        q, zero_point = np.zeros((rows, columns), np.uint8), np.zeros((rows, blocks), np.uint8)
        return AffineMatrix(scheme, q, np.zeros((rows, blocks), np.float16), zero_point)

    return QuantizedWeight(shape, scheme, read)


def _palette(shape: tuple[int, ...], scheme: PaletteScheme) -> PaletteWeight:
    rows, columns = shape[0], int(np.prod(shape[1:], dtype=np.int64))

    def matrix() -> PaletteMatrix:
        tables = np.zeros((scheme.num_groups(rows), scheme.levels), np.float16)
        scale = np.zeros(rows, np.float16) if scheme.per_channel_scale else None
        return PaletteMatrix(scheme, np.zeros((rows, columns), np.uint8), tables, scale)

    return PaletteWeight(shape, scheme, matrix)
