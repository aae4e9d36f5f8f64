"""A quantized weight: what a `WeightSource` holds where a recipe asks for integers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.weights.schemes import AffineMatrix, AffineScheme, PaletteMatrix, PaletteScheme
from fastvlm_convert.weights.source import CHUNK_BYTES, Weight


@dataclass(frozen=True)
class QuantizedWeight:
    """One tensor as integers with scales, read on demand.

    Attributes:
        shape: Dimensions of the weight; rows are the first axis, columns all others.
        scheme: How it is quantized.
        read: Returns rows [start, stop).
    """

    shape: tuple[int, ...]
    scheme: AffineScheme
    read: Callable[[int, int], AffineMatrix]

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Weights of one output channel."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    def chunks(self) -> Iterator[AffineMatrix]:
        """Consecutive rows, about `CHUNK_BYTES` of float32 at a time."""
        step = max(1, CHUNK_BYTES // (4 * self.columns))
        for start in range(0, self.rows, step):
            yield self.read(start, min(start + step, self.rows))

    def dense(self) -> Weight:
        """The same weight as the float32 that every target computes from the integers."""

        def read(start: int, stop: int) -> np.ndarray:
            return self.read(start, stop).dequantized().reshape((stop - start, *self.shape[1:]))

        return Weight(self.shape, f"int{self.scheme.bits}", read)


@dataclass(frozen=True)
class PaletteWeight:
    """One tensor as indices into tables.

    Attributes:
        shape: Dimensions of the weight; rows are the first axis, columns all others.
        scheme: How it is quantized.
        matrix: Returns it whole; cheap, because palettes are solved before.
    """

    shape: tuple[int, ...]
    scheme: PaletteScheme
    matrix: Callable[[], PaletteMatrix]

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Weights of one output channel."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    def dense(self) -> Weight:
        """The same weight as the float32 that its table and scales give."""

        def read(start: int, stop: int) -> np.ndarray:
            values = self.matrix().dequantized()[start:stop]
            return values.reshape((stop - start, *self.shape[1:]))

        return Weight(self.shape, f"palette{self.scheme.bits}", read)


StoredWeight = QuantizedWeight | PaletteWeight
AnyWeight = Weight | StoredWeight
MixedSource = Mapping[str, AnyWeight]


def dense_view(weights: MixedSource) -> dict[str, Weight]:
    """Every weight as floats: what the reference computes with to judge the integers alone."""
    return {name: w if isinstance(w, Weight) else w.dense() for name, w in weights.items()}


def stacked(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """Several weights of one scheme and width, one above the other."""
    first = weights[0]
    assert all((w.scheme, w.shape[1:]) == (first.scheme, first.shape[1:]) for w in weights)
    if len(weights) == 1:
        return first
    starts = np.cumsum([0, *(w.rows for w in weights)])

    def read(start: int, stop: int) -> AffineMatrix:
        parts = [
            weight.read(max(start, begin) - begin, min(stop, begin + weight.rows) - begin)
            for weight, begin in zip(weights, starts.tolist(), strict=False)
            if start < begin + weight.rows and stop > begin
        ]
        return AffineMatrix(
            first.scheme,
            np.concatenate([p.q for p in parts]),
            np.concatenate([p.scale for p in parts]),
            np.concatenate([p.zero_point for p in parts]),
        )

    return QuantizedWeight((int(starts[-1]), *first.shape[1:]), first.scheme, read)


def float_weight(weights: MixedSource, name: str) -> Weight:
    """A weight that no plan quantizes: a norm, a bias."""
    weight = weights[name]
    assert isinstance(weight, Weight), f"'{name}' is quantized"
    return weight


def quantized_only(weights: list[AnyWeight]) -> list[QuantizedWeight]:
    """The weights if all of them are quantized, which is so for all or for none; else nothing."""
    found = [w for w in weights if isinstance(w, QuantizedWeight)]
    assert len(found) in (0, len(weights)), "weights that are stacked must be quantized alike"
    return found
