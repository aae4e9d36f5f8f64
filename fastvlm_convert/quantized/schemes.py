"""How weights are quantized: schemes as data, and the integers they give.

An affine scheme stores w as integers q with `w ~= (q - zero_point) * scale`; a palette scheme stores indices
into a small table. Weights are seen as matrices [rows, columns]: rows are output channels, columns the input
axis along which blocks run. Scales are float16 everywhere, because that is what both targets store.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastvlm_convert.arithmetic import ceil_div


@dataclass(frozen=True)
class AffineScheme:
    """Integers with a scale, and a zero point unless symmetric.

    Attributes:
        bits: 4 or 8.
        block_size: Columns that share a scale; None shares it over the whole row (per channel).
        symmetric: The zero point is the middle of the range, 2^(bits-1). Scales may then be negative, so that
            either end of a block can take the extra value (full range).
    """

    bits: Literal[4, 8]
    block_size: int | None
    symmetric: bool

    @property
    def kind(self) -> str:
        """What a recipe calls it: `int4`."""
        return f"int{self.bits}"

    @property
    def rows_together(self) -> int:
        """Rows that depend on each other."""
        return 1

    @property
    def levels(self) -> int:
        """Number of integers."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme."""
        return 1 << (self.bits - 1)

    def num_blocks(self, columns: int) -> int:
        """Blocks of a row; the block size must divide it."""
        return 1 if self.block_size is None else columns // self.block_size

    def stored_bits(self, rows: int, columns: int) -> int:
        """Bits of a matrix in the file: integers, float16 scales and, where asymmetric, zero points."""
        blocks = rows * self.num_blocks(columns)
        return rows * columns * self.bits + blocks * (16 + (0 if self.symmetric else self.bits))


@dataclass(frozen=True)
class PaletteScheme:
    """Indices into a table of float16 values that a group of rows shares (Core ML only).

    Attributes:
        bits: 4, 6 or 8; the table has 2^bits values.
        group_size: Rows that share a table.
        per_channel_scale: Divide every row by its largest magnitude first.
    """

    bits: Literal[4, 6, 8]
    group_size: int
    per_channel_scale: bool

    @property
    def kind(self) -> str:
        """What a recipe calls it: `palette4`."""
        return f"palette{self.bits}"

    @property
    def rows_together(self) -> int:
        """Rows that depend on each other."""
        return self.group_size

    @property
    def levels(self) -> int:
        """Values in a table."""
        return 1 << self.bits

    def num_groups(self, rows: int) -> int:
        """Tables of a matrix; the last group may be smaller."""
        return ceil_div(rows, self.group_size)

    def stored_bits(self, rows: int, columns: int) -> int:
        """Bits of a matrix in the file: indices, tables and scales."""
        tables = self.num_groups(rows) * self.levels * 16
        return rows * columns * self.bits + tables + (16 * rows if self.per_channel_scale else 0)


Scheme = AffineScheme | PaletteScheme


@dataclass(frozen=True)
class AffineMatrix:
    """A quantized matrix, or consecutive rows of one.

    Attributes:
        scheme: How.
        q: uint8 [rows, columns], each below `scheme.levels`.
        scale: float16 [rows, blocks].
        zero_point: uint8 [rows, blocks]; `scheme.middle` throughout where symmetric.
    """

    scheme: AffineScheme
    q: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray

    def dequantized(self) -> np.ndarray:
        """`float32(q - zero_point) * float32(scale)`, float32 [rows, columns]: what every target computes."""
        rows, columns = self.q.shape
        blocks = self.scale.shape[1]
        q = self.q.reshape(rows, blocks, columns // blocks).astype(np.float32)
        q -= self.zero_point[..., None].astype(np.float32)
        q *= self.scale[..., None].astype(np.float32)
        return q.reshape(rows, columns)

    def read(self, start: int, stop: int) -> "AffineMatrix":
        """Rows [start, stop)."""
        return AffineMatrix(
            self.scheme, self.q[start:stop], self.scale[start:stop], self.zero_point[start:stop]
        )

    @staticmethod
    def joined(matrices: Sequence["AffineMatrix"]) -> "AffineMatrix":
        """Matrices of one scheme, one above the other."""
        return AffineMatrix(
            matrices[0].scheme,
            np.concatenate([m.q for m in matrices]),
            np.concatenate([m.scale for m in matrices]),
            np.concatenate([m.zero_point for m in matrices]),
        )


@dataclass(frozen=True)
class PaletteMatrix:
    """A palettized matrix.

    Attributes:
        scheme: How.
        indices: uint8 [rows, columns], each below `scheme.levels`.
        palette: float16 [groups, levels].
        scale: float16 [rows], or None without a per-channel scale.
    """

    scheme: PaletteScheme
    indices: np.ndarray
    palette: np.ndarray
    scale: np.ndarray | None

    def dequantized(self) -> np.ndarray:
        """Values looked up, times the scale; float32 [rows, columns]."""
        group = np.arange(len(self.indices)) // self.scheme.group_size
        values = self.palette.astype(np.float32)[group[:, None], self.indices]
        return values if self.scale is None else values * self.scale.astype(np.float32)[:, None]

    def read(self, start: int, stop: int) -> "PaletteMatrix":
        """Rows [start, stop), which are whole groups."""
        size = self.scheme.group_size
        assert start % size == 0
        assert stop % size == 0 or stop == len(self.indices)
        return PaletteMatrix(
            self.scheme,
            self.indices[start:stop],
            self.palette[start // size : self.scheme.num_groups(stop)],
            None if self.scale is None else self.scale[start:stop],
        )

    @staticmethod
    def joined(matrices: Sequence["PaletteMatrix"]) -> "PaletteMatrix":
        """Matrices of one scheme, one above the other; all but the last are whole groups."""
        scales = [m.scale for m in matrices if m.scale is not None]
        return PaletteMatrix(
            matrices[0].scheme,
            np.concatenate([m.indices for m in matrices]),
            np.concatenate([m.palette for m in matrices]),
            np.concatenate(scales) if scales else None,
        )


QuantizedMatrix = AffineMatrix | PaletteMatrix
