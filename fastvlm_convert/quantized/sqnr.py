"""How far quantized weights are from the floats they stand for, measured while they are read anyway."""

from dataclasses import dataclass

import numpy as np

from fastvlm_convert.quantized.schemes import QuantizedMatrix
from fastvlm_convert.quantized.weight import AnyWeight, MixedSource
from fastvlm_convert.weights.source import Weight, WeightSource

_TILE = 1 << 15  # weights measured at a time: what stays in a core's cache


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

        def look(start: int, stop: int, matrix: QuantizedMatrix) -> None:
            for a, b in weight.spans(start, stop):
                self._measure(name, a, matrix.read(a - start, b - start).dequantized())

        return weight.watched(look)

    def _measure(self, name: str, start: int, values: np.ndarray) -> None:
        rows = self._rows[name][start : start + len(values)]
        if not np.isnan(rows).any():
            return
        floats = self._floats[name].read(start, start + len(values)).reshape(values.shape)
        step = max(1, _TILE // values.shape[1])
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            # Row by row: sums must not depend on how many rows are read at a time.
            for column, array in enumerate((floats[part], floats[part] - values[part])):
                exact = array.astype(np.float64)
                rows[part, column] = np.einsum("rc,rc->r", exact, exact)
