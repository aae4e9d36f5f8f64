"""Quantized weights in a graph: stored once, read by the operator that suits their place.

Scales are stored as float16 and cast to float32 before the operator, so that what it computes is the exact
product; runtimes fold the cast when they load the graph.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.exporters.onnx.data import Region
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.quantized.packing import pack
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme
from fastvlm_convert.quantized.weight import QuantizedWeight

OPSET_WITH_INT4 = 21


@dataclass(frozen=True)
class StoredAffine:
    """Where the parts of a quantized matrix lie in a data file.

    Attributes:
        scheme: How it is quantized.
        rows: Rows in the file, padding included.
        columns: Weights a row.
        q: Integers, packed two a byte where they have 4 bits, low nibble first.
        scale: float16 [rows, blocks].
        zero_point: Packed like the integers, each row to whole bytes; None where symmetric.
    """

    scheme: AffineScheme
    rows: int
    columns: int
    q: Region
    scale: Region
    zero_point: Region | None

    @property
    def location(self) -> str:
        """The file that holds them."""
        return self.q.location

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return self.scheme.num_blocks(self.columns)


def store_affine(graph: Graph, weight: QuantizedWeight, rows: int = 0) -> StoredAffine:
    """Write a matrix to a graph's data file; each row is quantized once, while it is written.

    Args:
        graph: Whose file.
        weight: The matrix.
        rows: Pad to at least so many rows, which dequantize to zero.
    """
    scheme, columns = weight.scheme, weight.columns
    rows = max(rows, weight.rows)
    scales: list[np.ndarray] = []
    zeros: list[np.ndarray] = []

    def integers() -> Iterator[np.ndarray]:
        for part in _padded(weight, rows):
            scales.append(part.scale)
            zeros.append(part.zero_point)
            graph.count(4 * part.q.size)
            yield pack(part.q, scheme.bits)

    blocks = scheme.num_blocks(columns)
    q = graph.data.append(integers(), rows * columns * scheme.bits // 8)
    scale = graph.data.append(scales, rows * blocks * 2)
    zero_point = None
    if not scheme.symmetric:
        packed = (pack(z, scheme.bits) for z in zeros)
        zero_point = graph.data.append(packed, rows * -(-blocks * scheme.bits // 8))
    return StoredAffine(scheme, rows, columns, q, scale, zero_point)


def _padded(weight: QuantizedWeight, rows: int) -> Iterator[AffineMatrix]:
    yield from weight.chunks()
    missing, scheme = rows - weight.rows, weight.scheme
    if missing > 0:
        blocks = scheme.num_blocks(weight.columns)
        yield AffineMatrix(
            scheme,
            np.full((missing, weight.columns), scheme.middle, np.uint8),
            np.ones((missing, blocks), np.float16),
            np.full((missing, blocks), scheme.middle, np.uint8),
        )


def matmul(graph: Graph, name: str, x: str, stored: StoredAffine, rows: int, bias: str = "") -> str:
    """Multiply by the transpose of the first `rows` rows."""
    scheme, blocks = stored.scheme, stored.blocks
    width = stored.columns // blocks
    bytes_a_block = width * scheme.bits // 8
    inputs = [
        x,
        graph.external(f"{name}_q", stored.q, "uint8", (rows, blocks, bytes_a_block)),
        _scale(graph, name, stored, (rows, blocks), graph.compute),
        _zero_point(graph, name, stored, rows),
        "",
        bias,
    ]
    while not inputs[-1]:
        inputs.pop()
    return graph.fused(
        "MatMulNBits",
        inputs,
        name,
        K=stored.columns,
        N=rows,
        bits=scheme.bits,
        block_size=width,
        accuracy_level=graph.accuracy_level,
    )


def gather(graph: Graph, name: str, ids: str, stored: StoredAffine) -> str:
    """Look rows up; float32."""
    scheme, blocks = stored.scheme, stored.blocks
    inputs = [
        graph.external("embed_tokens_q", stored.q, "uint8", (stored.rows, stored.columns * scheme.bits // 8)),
        ids,
        _scale(graph, "embed_tokens", stored, (stored.rows, blocks), "float32"),
        _zero_point(graph, "embed_tokens", stored, stored.rows),
    ]
    return graph.fused(
        "GatherBlockQuantized",
        inputs if inputs[-1] else inputs[:-1],
        name,
        gather_axis=0,
        quantize_axis=1,
        block_size=stored.columns // blocks,
        bits=scheme.bits,
    )


def _scale(graph: Graph, name: str, stored: StoredAffine, shape: tuple[int, ...], dtype: str) -> str:
    scale = graph.external(f"{name}_scale", stored.scale, "float16", shape)
    return scale if dtype == "float16" else graph.cast(scale, dtype, f"{name}_scale_{dtype}")


def _zero_point(graph: Graph, name: str, stored: StoredAffine, rows: int) -> str:
    if stored.zero_point is None:
        return ""
    bytes_a_row = -(-stored.blocks * stored.scheme.bits // 8)
    return graph.external(f"{name}_zero_point", stored.zero_point, "uint8", (rows, bytes_a_row))


def dequantized(graph: Graph, name: str, weight: QuantizedWeight) -> str:
    """A weight of any shape behind DequantizeLinear, for operators that take no integers themselves."""
    scheme, shape, rows = weight.scheme, weight.shape, weight.rows
    graph.opset = OPSET_WITH_INT4
    blocks = scheme.num_blocks(weight.columns)
    is_signed = scheme.symmetric
    dtype = f"{'int' if is_signed else 'uint'}{scheme.bits}"
    scales: list[np.ndarray] = []
    zeros: list[np.ndarray] = []

    def integers() -> Iterator[np.ndarray]:
        chunks = []
        for part in weight.chunks():
            scales.append(part.scale)
            zeros.append(part.zero_point)
            chunks.append(part.q)
            graph.count(4 * part.q.size)
        q = np.concatenate(chunks)
        if is_signed:  # the zero point of signed integers is zero and need not be stored
            q = q - np.uint8(scheme.middle)
            q &= np.uint8(scheme.levels - 1)
        yield pack(q.reshape(1, -1), scheme.bits)

    def zero_points() -> Iterator[np.ndarray]:
        yield pack(np.concatenate(zeros).reshape(1, -1), scheme.bits)

    per_block = blocks > 1
    scale_shape = (rows, blocks, *shape[2:]) if per_block else (rows,)
    inputs = [
        graph.tensor(f"{name}_q", integers(), dtype, shape),
        graph.tensor(f"{name}_scale", scales, "float16", scale_shape),
    ]
    if graph.compute != "float16":
        inputs[1] = graph.cast(inputs[1], graph.compute, f"{name}_scale_{graph.compute}")
    if not is_signed:
        inputs.append(graph.tensor(f"{name}_zero_point", zero_points(), dtype, scale_shape))
    if per_block:
        return graph.op("DequantizeLinear", inputs, name, axis=1, block_size=weight.columns // blocks)
    return graph.op("DequantizeLinear", inputs, name, axis=0)
