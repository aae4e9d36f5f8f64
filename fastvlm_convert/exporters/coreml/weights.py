"""Weights of a graph: floats in the storage dtype, integers and palettes behind what turns them into floats.

Scales and tables have the compute dtype, in which the runtime multiplies; float32 holds them exactly.
"""

from collections.abc import Sequence

import numpy as np

from fastvlm_convert.exporters.coreml.graph import Graph
from fastvlm_convert.exporters.coreml.split import row_spans, rows_of
from fastvlm_convert.exporters.coreml.values import Value
from fastvlm_convert.exporters.job import OnBytes, stored_chunks
from fastvlm_convert.io_names import FloatName
from fastvlm_convert.quantized.weight import AnyWeight, PaletteWeight, QuantizedWeight, alike, stacked
from fastvlm_convert.weights.source import Weight


def dense(graph: Graph, name: str, weights: Sequence[AnyWeight], dtype: FloatName) -> Value:
    """Weights as floats, whatever they are stored as.

    Args:
        graph: The graph that reads them.
        name: Unique name; an identifier.
        weights: One, or several that are stacked along their first axis and stored alike.
        dtype: Dtype of the operation that reads them.
    """
    if integers := alike(QuantizedWeight, weights):
        parts = AffineParts(stacked(integers), graph.on_bytes)
        return graph.once(name, lambda: dequantized(graph, name, parts, dtype))
    if palettes := alike(PaletteWeight, weights):
        return graph.once(name, lambda: looked_up(graph, name, stacked(palettes), dtype))
    return graph.once(name, lambda: floats(graph, name, alike(Weight, weights), dtype))


def dense_rows(graph: Graph, name: str, weight: AnyWeight, dtype: FloatName) -> list[Value]:
    """A table as `dense` has it, in parts where it has more rows than the graph allows."""
    spans = row_spans(weight, graph.widest)
    if len(spans) == 1:
        return [dense(graph, name, [weight], dtype)]
    return [dense(graph, f"{name}_{i}", [rows_of(weight, span)], dtype) for i, span in enumerate(spans)]


def floats(graph: Graph, name: str, weights: Sequence[Weight], dtype: FloatName) -> Value:
    """Float weights; a compile-time cast where they are stored in another dtype. Arguments as of `dense`."""
    storage = graph.precision.storage
    shape = (sum(w.shape[0] for w in weights), *weights[0].shape[1:])

    def load() -> np.ndarray:
        values: np.ndarray = np.empty(shape, storage)
        row = 0
        chunks = (chunk for weight in weights for chunk in weight.chunks())
        for chunk in stored_chunks(chunks, storage, name, graph.on_bytes):
            values[row : row + len(chunk)] = chunk
            row += len(chunk)
        return values

    return graph.floats(name, shape, load, storage, dtype)


def dequantized(graph: Graph, name: str, parts: "AffineParts", dtype: FloatName) -> Value:
    """A weight behind the compile-time dequantization of iOS 18."""
    weight, scheme = parts.weight, parts.weight.scheme
    integer = f"{'int' if scheme.symmetric else 'uint'}{scheme.bits}"
    shape = (weight.rows, scheme.num_blocks(weight.columns), *[1] * (len(weight.shape) - 2))
    inputs = {
        "data": graph.weight(f"{name}_q", integer, weight.shape, parts.integers),
        "scale": graph.weight(f"{name}_scale", dtype, shape, parts.scales),
    }
    if not scheme.symmetric:
        inputs["offset"] = graph.weight(f"{name}_zero_point", integer, shape, parts.zero_points)
    return graph.plain_op("constexpr_blockwise_shift_scale", name, **inputs)


def looked_up(graph: Graph, name: str, weight: PaletteWeight, dtype: FloatName) -> Value:
    """A weight behind the compile-time look-up of iOS 18: a table for every group of output channels.

    A scale per channel, where there is one, multiplies what was looked up, in the same way as `dequantized`.
    """
    scheme, parts = weight.scheme, _PaletteParts(weight, graph.on_bytes)
    integer, ones = f"uint{scheme.bits}", [1] * (len(weight.shape) - 1)
    table_shape = (scheme.num_groups(weight.rows), *ones, scheme.levels, 1)
    found = graph.plain_op(
        "constexpr_lut_to_dense",
        f"{name}_unscaled" if scheme.per_channel_scale else name,
        indices=graph.weight(f"{name}_indices", integer, weight.shape, parts.indices),
        lut=graph.weight(f"{name}_lut", dtype, table_shape, parts.tables),
    )
    if not scheme.per_channel_scale:
        return found
    scale = graph.weight(f"{name}_scale", dtype, (weight.rows, *ones), parts.scales)
    return graph.plain_op("constexpr_blockwise_shift_scale", name, data=found, scale=scale)


class AffineParts:
    """The integers, scales and zero points of a weight, which is quantized once for all three.

    The writer asks for each once, in the order of the program: integers first. What has been given is
    forgotten: scales and zero points of all of 7B are 300 MB.

    Args:
        weight: Read when the first of them is asked for.
        on_bytes: Called with the number of bytes of each part read, counted as float32.
        keeps_scales: Whether scales are asked for more than once.
    """

    def __init__(self, weight: QuantizedWeight, on_bytes: OnBytes, *, keeps_scales: bool = False) -> None:
        self.weight = weight
        self._on_bytes = on_bytes
        self._keeps_scales = keeps_scales
        self._scales: np.ndarray | None = None
        self._zero_points: np.ndarray | None = None

    def integers(self) -> np.ndarray:
        """Signed where symmetric, else unsigned; one a byte."""
        weight = self.weight
        q = np.empty((weight.rows, weight.columns), np.uint8)
        scales, zero_points, row = [], [], 0
        for part in weight.chunks():
            q[row : row + len(part.q)] = part.q
            row += len(part.q)
            scales.append(part.scale)
            zero_points.append(part.zero_point)
            self._on_bytes(4 * part.q.size)
        self._scales = np.concatenate(scales)
        if weight.scheme.symmetric:
            q -= np.uint8(weight.scheme.middle)  # wraps round, so the bits are those of the signed difference
            return q.view(np.int8)
        self._zero_points = np.concatenate(zero_points)
        return q

    def scales(self) -> np.ndarray:
        """float16 [rows, blocks]."""
        if self._scales is None:  # so few that the program holds them, and wants them at once
            self.integers()
        scales, self._scales = self._scales, self._scales if self._keeps_scales else None
        assert scales is not None
        return scales

    def zero_points(self) -> np.ndarray:
        """uint8 [rows, blocks], of an asymmetric scheme."""
        if self._zero_points is None:
            self.integers()
        zero_points, self._zero_points = self._zero_points, None
        assert zero_points is not None
        return zero_points


class _PaletteParts:
    """The indices, tables and scales of a weight, which is solved once for all three.

    Indices, the bulk, are kept until they are asked for, which the writer does first.
    """

    def __init__(self, weight: PaletteWeight, on_bytes: OnBytes) -> None:
        self._weight = weight
        self._on_bytes = on_bytes
        self._indices: np.ndarray | None = None
        self._small: tuple[np.ndarray, np.ndarray] | None = None

    def indices(self) -> np.ndarray:
        """One a byte."""
        self._solve()
        indices, self._indices = self._indices, None
        assert indices is not None, "indices were asked for twice"
        return indices

    def tables(self) -> np.ndarray:
        return self._solve()[0]

    def scales(self) -> np.ndarray:
        return self._solve()[1]

    def _solve(self) -> tuple[np.ndarray, np.ndarray]:
        if self._small is None:
            self._indices = np.empty((self._weight.rows, self._weight.columns), np.uint8)
            tables, scales, row = [], [np.empty(0, np.float16)], 0
            for part in self._weight.chunks():
                self._indices[row : row + len(part.indices)] = part.indices
                row += len(part.indices)
                tables.append(part.palette)
                scales += [] if part.scale is None else [part.scale]
                self._on_bytes(4 * part.indices.size)
            self._small = np.concatenate(tables), np.concatenate(scales)
        return self._small
