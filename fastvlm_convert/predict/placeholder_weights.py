"""Weights that have shapes and schemes but no content: what predictions are made with."""

from collections.abc import Sequence
from typing import NoReturn

from fastvlm_convert.quantized.activations import (
    ActivationBits,
    LayerScales,
    TensorScale,
    gives_floats,
    is_depthwise,
    is_in_encoder,
    unquantizable,
)
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.schemes import AffineScheme, PaletteScheme
from fastvlm_convert.quantized.weight import AnyWeight, MixedSource, PaletteWeight, QuantizedWeight
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.shapes import weight_shapes
from fastvlm_convert.weights.source import Weight


def placeholder_weights(
    config: ModelConfig, plans: Sequence[LayerPlan], bits: ActivationBits | None = None
) -> MixedSource:
    """What the engine would give to an exporter, without the numbers: reading one is an error.

    Args:
        config: Dimensions.
        plans: Schemes of the layers.
        bits: Of activations; None where they are floats. Which layers are kept in float is not known, but
            that of depthwise ones most are.

    Returns:
        Canonical names, folded, integers or palettes where planned.
    """
    shapes = {name: _hollow(shape) for name, shape in weight_shapes(config).items()}
    weights: dict[str, AnyWeight] = {name: _hollow(weight.shape) for name, weight in fold(shapes).items()}
    for plan in plans:
        if isinstance(plan.scheme, AffineScheme):
            weights[f"{plan.layer}.weight"] = QuantizedWeight(
                plan.shape, plan.scheme, _read, _placeholder_scales(plan, bits)
            )
        elif isinstance(plan.scheme, PaletteScheme):
            weights[f"{plan.layer}.weight"] = PaletteWeight(plan.shape, plan.scheme, _read)
    return weights


def _placeholder_scales(plan: LayerPlan, bits: ActivationBits | None) -> LayerScales | None:
    if bits is None or not is_in_encoder(plan.layer) or is_depthwise(plan) or unquantizable(plan):
        return None
    scale = TensorScale(bits, 1.0, 0)
    return LayerScales(scale, None if gives_floats(plan) else scale)


def _hollow(shape: tuple[int, ...]) -> Weight:
    return Weight(shape, "float32", _read)


def _read(*rows: int) -> NoReturn:
    raise AssertionError(f"a weight without content was read: {rows}")
