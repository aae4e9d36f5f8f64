"""Layers that multiply integers: QuantizeLinear and DequantizeLinear around a float operator.

ONNX Runtime makes `QLinearConv` of such a convolution and `MatMulIntegerToFloat` of such a product when it
loads the graph; runtimes that do not compute what the graph says, in floats.
"""

from collections.abc import Iterator

import numpy as np

from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.weights import OPSET_WITH_INT4, floats
from fastvlm_convert.quantized.activations import LayerScales, TensorScale
from fastvlm_convert.quantized.weight import QuantizedWeight
from fastvlm_convert.weights.source import Weight


def static_conv(
    graph: Graph, name: str, x: str, weights: tuple[QuantizedWeight, Weight], stride: int, groups: int
) -> str:
    """Convolution of integers, with "same" padding; floats in and out."""
    kernel, bias = weights
    size = kernel.shape[2]
    scales = _scales(kernel)
    assert scales.output is not None
    parts = _Integers(graph, kernel)
    read = rounded(graph, f"{name}_input", x, scales.input)
    stored = parts.store(f"{name}_weight", kernel.shape, 0)
    products = scales.bias_scale(parts.scale)
    sums = graph.op(
        "Conv",
        f"{name}_products",
        [read, stored, _integer_bias(graph, name, bias, products)],
        kernel_shape=[size] * 2,
        strides=[stride] * 2,
        pads=[size // 2] * 4,
        group=groups,
    )
    return rounded(graph, name, sums, scales.output)


def static_linear(graph: Graph, name: str, x: str, weight: QuantizedWeight, bias: Weight | None) -> str:
    """Multiply 8-bit integers by W^T; the bias is added to floats."""
    parts = _Integers(graph, weight)
    read = rounded(graph, f"{name}_input", x, _scales(weight).input)
    stored = parts.store(f"{name}_weight", weight.shape[::-1], 1)
    if bias is None:
        return graph.op("MatMul", name, [read, stored])
    product = graph.op("MatMul", f"{name}_product", [read, stored])
    return graph.op("Add", name, [product, floats(graph, f"{name}_bias", [bias])])


def input_scale(weight: QuantizedWeight) -> TensorScale:
    """How the layer of a weight rounds what it reads."""
    return _scales(weight).input


def _scales(weight: QuantizedWeight) -> LayerScales:
    assert weight.activations is not None
    return weight.activations


def rounded(graph: Graph, name: str, x: str, scale: TensorScale) -> str:
    """A value as integers and as floats again, under a name."""
    graph.opset = OPSET_WITH_INT4  # which also has 16 bits
    parameters = [
        graph.scalar(f"{name}_scale", np.float32(scale.scale)),
        graph.scalar(f"{name}_zero_point", np.dtype(scale.dtype).type(scale.zero_point)),
    ]
    graph.op("QuantizeLinear", f"{name}_integers", [x, *parameters])
    return graph.op("DequantizeLinear", name, [f"{name}_integers", *parameters])


def _integer_bias(graph: Graph, name: str, bias: Weight, scale: np.ndarray) -> str:
    """A bias among the products, as int32; what runtimes add to their sums."""

    def integers() -> Iterator[np.ndarray]:
        yield np.rint(bias.array() / scale).astype(np.int32)

    rows = bias.shape[0]
    inputs = [
        graph.weight(f"{name}_bias_q", "int32", (rows,), integers()),
        graph.weight(f"{name}_bias_scale", "float32", (rows,), iter([scale])),
    ]
    graph.on_bytes(4 * rows)
    return graph.op("DequantizeLinear", f"{name}_bias", inputs, axis=0)


class _Integers:
    """The integers of a weight, which is quantized once, for them.

    Attributes:
        scale: float16 [rows, 1]; known once they are stored.
    """

    def __init__(self, graph: Graph, weight: QuantizedWeight) -> None:
        self._graph = graph
        self._weight = weight
        self.scale = np.ones((weight.rows, 1), np.float16)

    def store(self, name: str, shape: tuple[int, ...], axis: int) -> str:
        """Write them in the order of a shape whose axis `axis` are the rows, behind DequantizeLinear."""
        weight, graph = self._weight, self._graph

        def integers() -> Iterator[np.ndarray]:
            parts = list(weight.chunks())
            self.scale = np.concatenate([part.scale for part in parts])
            q = np.concatenate([part.q for part in parts]) ^ np.uint8(weight.scheme.middle)
            graph.on_bytes(4 * q.size)
            yield (q if axis == 0 else q.T).reshape(-1)

        inputs = [
            graph.weight(f"{name}_q", "int8", shape, integers()),
            graph.weight(f"{name}_scale", "float32", (weight.rows,), self._scales()),
        ]
        return graph.op("DequantizeLinear", name, inputs, axis=axis)

    def _scales(self) -> Iterator[np.ndarray]:
        yield self.scale[:, 0].astype(np.float32)
