"""Weights that have shapes and schemes but no content: what predictions are made with."""

from collections.abc import Sequence
from typing import NoReturn

from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.schemes import AffineScheme, PaletteScheme
from fastvlm_convert.quantized.weight import AnyWeight, MixedSource, PaletteWeight, QuantizedWeight
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.shapes import weight_shapes
from fastvlm_convert.weights.source import Weight


def placeholder_weights(config: ModelConfig, plans: Sequence[LayerPlan]) -> MixedSource:
    """What the engine would give to an exporter, without the numbers: reading one is an error.

    Args:
        config: Dimensions.
        plans: Schemes of the layers.

    Returns:
        Canonical names, folded, integers or palettes where planned.
    """
    shapes = {name: _hollow(shape) for name, shape in weight_shapes(config).items()}
    weights: dict[str, AnyWeight] = {name: _hollow(weight.shape) for name, weight in fold(shapes).items()}
    for plan in plans:
        if isinstance(plan.scheme, AffineScheme):
            weights[f"{plan.layer}.weight"] = QuantizedWeight(plan.shape, plan.scheme, _read)
        elif isinstance(plan.scheme, PaletteScheme):
            weights[f"{plan.layer}.weight"] = PaletteWeight(plan.shape, plan.scheme, _read)
    return weights


def _hollow(shape: tuple[int, ...]) -> Weight:
    return Weight(shape, "float32", _read)


def _read(*rows: int) -> NoReturn:
    raise AssertionError(f"a weight without content was read: {rows}")
