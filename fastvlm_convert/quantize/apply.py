"""Quantize a model's weights as a plan says; row by row, when they are read."""

from collections.abc import Mapping, Sequence

import numpy as np

from fastvlm_convert.quantize.search import quantize_affine
from fastvlm_convert.weights.plan import LayerPlan
from fastvlm_convert.weights.quantized import AnyWeight, QuantizedWeight
from fastvlm_convert.weights.schemes import AffineMatrix, AffineScheme
from fastvlm_convert.weights.source import Weight


def quantize_weights(weights: Mapping[str, Weight], plans: Sequence[LayerPlan]) -> dict[str, AnyWeight]:
    """A view in which the planned layers are integers, found by scale search without data.

    Args:
        weights: Canonical names, folded.
        plans: One a layer.
    """
    quantized: dict[str, AnyWeight] = dict(weights)
    for plan in plans:
        if isinstance(plan.scheme, AffineScheme) and plan.solver == "search":
            name = f"{plan.layer}.weight"
            quantized[name] = _searched(weights[name], plan.scheme)
    return quantized


def _searched(weight: Weight, scheme: AffineScheme) -> QuantizedWeight:
    def read(start: int, stop: int) -> AffineMatrix:
        rows = weight.read(start, stop).reshape(stop - start, -1)
        return quantize_affine(np.ascontiguousarray(rows, np.float32), scheme)

    return QuantizedWeight(weight.shape, scheme, read)
