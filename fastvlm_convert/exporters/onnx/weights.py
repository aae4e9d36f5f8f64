"""Weights of a graph: floats in the storage dtype, integers behind an operator that turns them into floats.

Scales are stored as float16 and cast to float32 before the operator, so that what it computes is the exact
product; runtimes fold the cast when they load the graph.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from fastvlm_convert.exporters.job import stored_chunks
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.quantized.packing import pack
from fastvlm_convert.quantized.weight import AnyWeight, QuantizedWeight, alike, stacked
from fastvlm_convert.weights.source import Weight

OPSET_WITH_INT4 = 21


def dense(graph: Graph, name: str, weights: Sequence[AnyWeight]) -> str:
    """Weights as floats in the compute dtype, whatever they are stored as.

    Args:
        graph: The graph that reads them.
        name: Unique name.
        weights: One, or several that are stacked along their first axis and stored alike.

    Raises:
        RecipeError: A value does not fit the storage dtype.
        CheckpointError: A value is not finite, or cannot be read.
    """
    if integers := alike(QuantizedWeight, weights):
        return dequantized(graph, name, stacked(integers))
    return floats(graph, name, alike(Weight, weights))


def floats(graph: Graph, name: str, weights: Sequence[Weight]) -> str:
    """Float weights in the compute dtype; arguments as of `dense`."""
    shape = (sum(w.shape[0] for w in weights), *weights[0].shape[1:])
    chunks = (chunk for weight in weights for chunk in weight.chunks())
    stored = stored_chunks(chunks, graph.storage, name, graph.on_bytes)
    graph.weight(name, graph.storage, shape, stored)
    if graph.storage == graph.compute:
        return name
    return graph.cast(name, graph.compute, f"{name}_{graph.compute}")


def dequantized(graph: Graph, name: str, weight: QuantizedWeight) -> str:
    """A weight of any shape as floats, for operators that take no integers themselves.

    ONNX Runtime executes DequantizeLinear for every picture, 200 times in the encoder, and then cannot lay
    convolutions out in blocks. Where the graph folds weights it gets a cast and a product instead, which give
    the same bits and which the runtime executes when it loads the graph.
    """
    scheme, shape, rows = weight.scheme, weight.shape, weight.rows
    graph.opset = OPSET_WITH_INT4
    parts = _Parts(graph, weight)
    dtype = f"{'int' if scheme.symmetric else 'uint'}{scheme.bits}"
    blocks = scheme.num_blocks(weight.columns)
    per_block = blocks > 1
    scale_shape = (rows, blocks, *shape[2:]) if per_block else (rows,)
    inputs = [
        graph.weight(f"{name}_q", dtype, shape, parts.integers()),
        graph.weight(f"{name}_scale", "float16", scale_shape, parts.scales),
    ]
    if graph.compute != "float16":
        inputs[1] = graph.cast(inputs[1], graph.compute, f"{name}_scale_{graph.compute}")
    if not scheme.symmetric:
        inputs.append(graph.weight(f"{name}_zero_point", dtype, scale_shape, parts.zero_points()))
    if graph.folds_weights:
        width = weight.columns // blocks if per_block else None
        return _product(graph, name, inputs, shape, width)
    if per_block:
        return graph.op("DequantizeLinear", name, inputs, axis=1, block_size=weight.columns // blocks)
    return graph.op("DequantizeLinear", name, inputs, axis=0)


def _product(
    graph: Graph, name: str, inputs: Sequence[str], shape: tuple[int, ...], width: int | None
) -> str:
    """`(integers - zero points) * scales`.

    Args:
        graph: The graph.
        name: Of the product.
        inputs: Integers, scales, and zero points if there are any.
        shape: Of the integers.
        width: Columns of a block; None where a scale is a whole row's.
    """
    rows = shape[0]
    parts = shape if width is None else (rows, shape[1] // width, width, *shape[2:])
    row = (rows, *(1 for _ in parts[1:]))
    ends = row if width is None else (rows, shape[1] // width, 1, *shape[2:])

    def shaped(value: str, to: tuple[int, ...]) -> str:
        constant = graph.constant("_".join(["shape", *map(str, to)]), np.array(to, np.int64))
        return graph.op("Reshape", f"{value}_shaped", [value, constant])

    values = graph.cast(inputs[0], graph.compute, f"{inputs[0]}_{graph.compute}")
    if width is not None:
        values = shaped(values, parts)
    if len(inputs) > 2:
        zero_points = graph.cast(inputs[2], graph.compute, f"{inputs[2]}_{graph.compute}")
        values = graph.op("Sub", f"{name}_centered", [values, shaped(zero_points, ends)])
    scales = shaped(inputs[1], ends)
    if width is None:
        return graph.op("Mul", name, [values, scales])
    product = graph.op("Mul", f"{name}_blocks", [values, scales])
    whole = graph.constant("_".join(["shape", *map(str, shape)]), np.array(shape, np.int64))
    return graph.op("Reshape", name, [product, whole])


class _Parts:
    """The integers, scales and zero points of a weight, which is quantized once, for its integers."""

    def __init__(self, graph: Graph, weight: QuantizedWeight) -> None:
        self._graph = graph
        self._weight = weight
        self._zero_points: list[np.ndarray] = []
        self.scales: list[np.ndarray] = []

    def integers(self) -> Iterator[np.ndarray]:
        scheme, chunks = self._weight.scheme, []
        for part in self._weight.chunks():
            self.scales.append(part.scale)
            self._zero_points.append(part.zero_point)
            chunks.append(part.q)
            self._graph.on_bytes(4 * part.q.size)
        q = np.concatenate(chunks)
        if scheme.symmetric:  # the zero point of signed integers is zero and need not be stored
            q = q - np.uint8(scheme.middle)
            q &= np.uint8(scheme.levels - 1)
        yield pack(q.reshape(1, -1), scheme.bits)

    def zero_points(self) -> Iterator[np.ndarray]:
        yield pack(np.concatenate(self._zero_points).reshape(1, -1), self._weight.scheme.bits)
