"""Solve the layers that share an input, given what they read in the float and in the quantized model."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.quantization.asymmetric_calibration import Moments, corrected_bias, target_weight
from fastvlm_convert.quantization.awq import channel_scales
from fastvlm_convert.quantization.gptq import gptq
from fastvlm_convert.quantization.palettes import palettize
from fastvlm_convert.quantization.search import quantize_affine
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.schemes import AffineScheme, QuantizedMatrix
from fastvlm_convert.recipe_settings import CalibrationSettings


@dataclass(frozen=True)
class FloatLayer:
    """A layer to solve.

    Attributes:
        plan: Its scheme and solver.
        weight: float32 [rows, columns].
        bias: float32 [rows], or None without one.
    """

    plan: LayerPlan
    weight: np.ndarray
    bias: np.ndarray | None


@dataclass(frozen=True)
class FloatGroup:
    """Layers that share an input.

    Attributes:
        layers: Those that are to be solved.
        norm: Parameters of the norm that makes the input, by canonical name, float32 [columns] each; empty
            unless all layers that read it are among `layers` and channel scales may be folded into it.
    """

    layers: tuple[FloatLayer, ...]
    norm: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class SolvedLayer:
    """A layer solved.

    Attributes:
        name: Its name.
        matrix: Its weight.
        floats: Float32 tensors that changed with it, by canonical name: its bias; and with the first layer of
            a group the norm before.
    """

    name: str
    matrix: QuantizedMatrix
    floats: Mapping[str, np.ndarray]


def solve_layers(
    group: FloatGroup, moments: Moments, settings: CalibrationSettings, only: Collection[str]
) -> Iterator[SolvedLayer]:
    """Solve some layers of a group.

    Args:
        group: All of its layers, because they share channel scales.
        moments: Of what they read.
        settings: How data is used.
        only: Names of the layers to solve.
    """
    scales = _scales(group, moments)
    norm = {name: value / scales for name, value in group.norm.items()} if scales is not None else {}
    if scales is not None:
        moments = moments.scaled(scales)
    for layer in group.layers:
        name = layer.plan.layer
        if name not in only:
            continue
        original = layer.weight if scales is None else layer.weight * scales
        matrix = _rounded(target_weight(original, moments), moments.hessian, layer.plan, settings)
        floats = dict(norm) if layer is group.layers[0] else {}
        if layer.bias is not None:
            floats[f"{name}.bias"] = corrected_bias(layer.bias, original, matrix.dequantized(), moments)
        yield SolvedLayer(name, matrix, floats)


def _scales(group: FloatGroup, moments: Moments) -> np.ndarray | None:
    """AWQ's channel scales, float32 [columns]; None where there is no norm for them, or no one scheme."""
    schemes = {layer.plan.scheme for layer in group.layers}
    scheme = schemes.pop()
    if not group.norm or schemes or not isinstance(scheme, AffineScheme):
        return None
    return channel_scales([layer.weight for layer in group.layers], moments.hessian, scheme)


def _rounded(
    weight: np.ndarray, hessian: np.ndarray, plan: LayerPlan, settings: CalibrationSettings
) -> QuantizedMatrix:
    assert plan.scheme is not None
    is_compensated = plan.solver == "gptq"
    if isinstance(plan.scheme, AffineScheme):
        if is_compensated:
            return gptq(weight, hessian, plan.scheme, damping=settings.damping)
        return quantize_affine(weight, plan.scheme, np.diag(hessian).astype(np.float32))
    if is_compensated:
        return palettize(weight, plan.scheme, hessian=hessian, damping=settings.damping)
    return palettize(weight, plan.scheme, np.diag(hessian))
