"""Operators of ONNX Runtime that read integers themselves, so that a matrix is never held as floats."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.arithmetic import ceil_div
from fastvlm_convert.exporters.onnx.data import Region
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.weights import floats
from fastvlm_convert.quantized.packing import pack
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme
from fastvlm_convert.quantized.weight import AnyWeight, QuantizedWeight, alike, stacked
from fastvlm_convert.weights.source import Weight


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

    @property
    def block_size(self) -> int:
        """Weights of a block."""
        return self.columns // self.blocks


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
            graph.on_bytes(4 * part.q.size)
            yield pack(part.q, scheme.bits)

    blocks = scheme.num_blocks(columns)
    q = graph.data.append(integers(), rows * columns * scheme.bits // 8)
    scale = graph.data.append(scales, rows * blocks * 2)
    zero_point = None
    if not scheme.symmetric:
        packed = (pack(z, scheme.bits) for z in zeros)
        zero_point = graph.data.append(packed, rows * ceil_div(blocks * scheme.bits, 8))
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


def product(graph: Graph, name: str, x: str, weights: Sequence[AnyWeight]) -> str:
    """Multiply by W^T, with W as the checkpoint stores it, [out, in]: nothing is transposed on the way.

    Several weights are stacked along their output rows.
    """
    if integers := alike(QuantizedWeight, weights):
        whole = stacked(integers)
        return product_with_stored(graph, name, x, store_affine(graph, whole), whole.rows)
    matrix = floats(graph, f"{name}_weight", alike(Weight, weights))
    return graph.fused("FusedMatMul", name, [x, matrix], transB=1)


def product_with_stored(graph: Graph, name: str, x: str, stored: StoredAffine, rows: int) -> str:
    """Multiply by the transpose of the first `rows` rows."""
    scheme, blocks, width = stored.scheme, stored.blocks, stored.block_size
    inputs = [
        x,
        graph.external(f"{name}_q", "uint8", (rows, blocks, width * scheme.bits // 8), stored.q),
        _scale(graph, name, stored, (rows, blocks), graph.compute),
    ]
    return graph.fused(
        "MatMulNBits",
        name,
        inputs + _zero_points(graph, name, stored, rows),
        K=stored.columns,
        N=rows,
        bits=scheme.bits,
        block_size=width,
        accuracy_level=graph.accuracy_level,
    )


def _scale(graph: Graph, name: str, stored: StoredAffine, shape: tuple[int, ...], dtype: str) -> str:
    scale = graph.external(f"{name}_scale", "float16", shape, stored.scale)
    return scale if dtype == "float16" else graph.cast(scale, dtype, f"{name}_scale_{dtype}")


def _zero_points(graph: Graph, name: str, stored: StoredAffine, rows: int) -> list[str]:
    if stored.zero_point is None:
        return []
    bytes_a_row = ceil_div(stored.blocks * stored.scheme.bits, 8)
    return [graph.external(f"{name}_zero_point", "uint8", (rows, bytes_a_row), stored.zero_point)]
