"""How far quantized weights are from the floats they stand for, measured while they are read anyway."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from fastvlm_convert.weights.quantized import AnyWeight, MixedSource, PaletteWeight, QuantizedWeight
from fastvlm_convert.weights.schemes import AffineMatrix, PaletteMatrix
from fastvlm_convert.weights.source import CHUNK_BYTES, Weight, WeightSource


@dataclass(frozen=True)
class SquaredSums:
    """Sums of squares over one weight.

    Attributes:
        signal: Of the floats.
        noise: Of the differences.
    """

    signal: float
    noise: float

    @property
    def sqnr_db(self) -> float:
        """Signal to noise; there must be noise."""
        tiny = float(np.finfo(np.float64).tiny)
        return float(10 * np.log10(max(self.signal, tiny) / self.noise))


class ErrorMeter:
    """A view of quantized weights that compares them with floats as they are read, each row once.

    Args:
        floats: The weights that were quantized, by name.
    """

    def __init__(self, floats: WeightSource) -> None:
        self._floats = floats
        self._rows: dict[str, np.ndarray] = {}  # signal and noise by row, float64 [rows, 2]; NaN if not read

    def view(self, weights: MixedSource) -> dict[str, AnyWeight]:
        """The same weights; those that are quantized are measured when they are read."""
        return {name: self._measured(name, weight) for name, weight in weights.items()}

    def sums(self, name: str) -> SquaredSums:
        """What was measured of a quantized weight; all its rows must have been read."""
        signal, noise = self._rows[name].sum(0).tolist()
        assert signal == signal, f"'{name}' was not read whole"
        return SquaredSums(signal, noise)

    def _measured(self, name: str, weight: AnyWeight) -> AnyWeight:
        if isinstance(weight, Weight):
            return weight
        self._rows[name] = np.full((weight.rows, 2), np.nan)
        original = weight  # mypy forgets what it is inside the functions
        if isinstance(original, PaletteWeight):
            palette = original

            def groups(start: int, stop: int) -> PaletteMatrix:
                matrix = palette.read(start, stop)
                for first, part in _palette_parts(matrix):
                    self._measure(name, start + first, part.dequantized())
                return matrix

            return replace(palette, read=groups)
        affine: QuantizedWeight = original

        def read(start: int, stop: int) -> AffineMatrix:
            matrix = affine.read(start, stop)
            for first, part in _affine_parts(matrix):
                self._measure(name, start + first, part.dequantized())
            return matrix

        return replace(affine, read=read)

    def _measure(self, name: str, start: int, values: np.ndarray) -> None:
        rows = self._rows[name][start : start + len(values)]
        if not np.isnan(rows).any():
            return
        floats = self._floats[name].read(start, start + len(values)).reshape(values.shape)
        # Row by row: sums must not depend on how many rows are read at a time.
        rows[:, 0] = np.square(floats, dtype=np.float64).sum(1)
        rows[:, 1] = np.square(floats - values, dtype=np.float64).sum(1)


def _affine_parts(matrix: AffineMatrix) -> Iterator[tuple[int, AffineMatrix]]:
    for a, b in _spans(matrix.q.shape, 1):
        yield a, AffineMatrix(matrix.scheme, matrix.q[a:b], matrix.scale[a:b], matrix.zero_point[a:b])


def _palette_parts(matrix: PaletteMatrix) -> Iterator[tuple[int, PaletteMatrix]]:
    for a, b in _spans(matrix.indices.shape, matrix.scheme.group_size):
        yield a, matrix.read(a, b)


def _spans(shape: tuple[int, ...], multiple: int) -> Iterator[tuple[int, int]]:
    """Rows [a, b) of a matrix, about `CHUNK_BYTES` of float32 each, starting at multiples of a number."""
    rows, columns = shape
    step = max(1, CHUNK_BYTES // (4 * columns * multiple)) * multiple
    for a in range(0, rows, step):
        yield a, min(a + step, rows)
