"""Layers that multiply integers: `quantize` and `dequantize` of iOS 17 around a float operation.

This is the form that coremltools' own `linear_quantize_activations` makes, which Core ML documents as W8A8.
Its integers are signed: ours, and their zero points, less 128.
"""

from functools import partial

import numpy as np

from fastvlm_convert.exporters.coreml.graph import Graph, scalar
from fastvlm_convert.exporters.coreml.values import Value
from fastvlm_convert.exporters.coreml.weights import AffineParts, dequantized
from fastvlm_convert.quantized.activations import LayerScales, TensorScale
from fastvlm_convert.quantized.weight import QuantizedWeight
from fastvlm_convert.weights.source import Weight

_MIDDLE = 128  # of unsigned integers


def static_conv(
    graph: Graph, name: str, x: Value, weights: tuple[QuantizedWeight, Weight], stride: int, groups: int
) -> Value:
    """Convolution of integers, with "same" padding; floats in and out."""
    kernel, bias = weights
    scales, dtype, edge = _scales(kernel), graph.dtype(name), kernel.shape[2] // 2
    assert scales.output is not None
    parts = AffineParts(kernel, graph.on_bytes, keeps_scales=True)  # the bias is in steps of them
    sums = graph.op(
        "conv",
        f"{name}_products",
        dtype,
        x=rounded_input(graph, name, x, kernel),
        weight=dequantized(graph, f"{name}_weight", parts, dtype),
        bias=graph.constant(f"{name}_bias", bias.shape, partial(_whole_bias, parts, bias), dtype),
        strides=[stride, stride],
        pad=[edge] * 4,
        pad_type="custom",
        dilations=[1, 1],
        groups=groups,
    )
    return _rounded(graph, name, name, sums, scales.output)


def rounded_input(graph: Graph, name: str, x: Value, weight: QuantizedWeight) -> Value:
    """What a layer reads, as the integers that its weight says, and as floats again."""
    return _rounded(graph, name, f"{name}_input", x, _scales(weight).input)


def _scales(weight: QuantizedWeight) -> LayerScales:
    assert weight.activations is not None
    return weight.activations


def _rounded(graph: Graph, layer: str, name: str, x: Value, scale: TensorScale) -> Value:
    """A value of a layer as integers and as floats again, under a name."""
    assert scale.bits == 8, "MIL has integers of 8 bits alone"
    dtype = graph.dtype(layer)
    parameters = {"scale": scalar(dtype, scale.scale), "zero_point": np.int8(scale.zero_point - _MIDDLE)}
    integers = graph.op("quantize", f"{name}_integers", dtype, input=x, output_dtype="int8", **parameters)
    return graph.plain_op("dequantize", name, input=integers, **parameters)


def _whole_bias(parts: AffineParts, bias: Weight) -> np.ndarray:
    """A bias in whole steps of the products, as integer kernels add it; float32 of its shape."""
    step = _scales(parts.weight).bias_scale(parts.scales())
    whole: np.ndarray = np.rint(bias.array() / step) * step
    return whole
