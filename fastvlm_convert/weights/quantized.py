"""A quantized weight: what a `WeightSource` holds where a recipe asks for integers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fastvlm_convert.errors import TargetError
from fastvlm_convert.weights.schemes import AffineMatrix, AffineScheme, PaletteMatrix, PaletteScheme, joined
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
    """One tensor as indices into tables, read on demand.

    Attributes:
        shape: Dimensions of the weight; rows are the first axis, columns all others.
        scheme: How it is quantized.
        read: Returns rows [start, stop), whole groups, which is what can be solved alone.
    """

    shape: tuple[int, ...]
    scheme: PaletteScheme
    read: Callable[[int, int], PaletteMatrix]

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Weights of one output channel."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    def matrix(self) -> PaletteMatrix:
        """All of it."""
        return self.read(0, self.rows)

    def chunks(self) -> Iterator[PaletteMatrix]:
        """Consecutive groups, about `CHUNK_BYTES` of float32 at a time."""
        size = self.scheme.group_size
        step = max(1, CHUNK_BYTES // (4 * self.columns * size)) * size
        for start in range(0, self.rows, step):
            yield self.read(start, min(start + step, self.rows))

    def dense(self) -> Weight:
        """The same weight as the float32 that its tables and scales give."""

        def read(start: int, stop: int) -> np.ndarray:
            size = self.scheme.group_size
            first = start // size * size
            groups = self.read(first, min(-(-stop // size) * size, self.rows))
            return groups.dequantized()[start - first : stop - first].reshape((stop - start, *self.shape[1:]))

        return Weight(self.shape, f"palette{self.scheme.bits}", read)


StoredWeight = QuantizedWeight | PaletteWeight
AnyWeight = Weight | StoredWeight
MixedSource = Mapping[str, AnyWeight]
AffineSource = Mapping[str, Weight | QuantizedWeight]

_T = TypeVar("_T", Weight, QuantizedWeight, PaletteWeight)


def dense_view(weights: MixedSource) -> dict[str, Weight]:
    """Every weight as floats: what the reference computes with to judge the integers alone."""
    return {name: w if isinstance(w, Weight) else w.dense() for name, w in weights.items()}


def stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Several weights of one scheme and width, one above the other."""
    first = weights[0]
    if len(weights) == 1:
        return first

    def read(start: int, stop: int) -> AffineMatrix:
        parts = [weights[i].read(begin, end) for i, begin, end in _rows_of(weights, start, stop)]
        return AffineMatrix(
            first.scheme,
            np.concatenate([p.q for p in parts]),
            np.concatenate([p.scale for p in parts]),
            np.concatenate([p.zero_point for p in parts]),
        )

    return QuantizedWeight(_stacked_shape(weights), first.scheme, read)


def stacked_palettes(weights: Sequence[PaletteWeight]) -> PaletteWeight:
    """Several weights of one scheme and width, one above the other; each is whole groups."""
    first = weights[0]
    if len(weights) == 1:
        return first
    assert all(w.rows % w.scheme.group_size == 0 for w in weights)

    def read(start: int, stop: int) -> PaletteMatrix:
        return joined([weights[i].read(begin, end) for i, begin, end in _rows_of(weights, start, stop)])

    return PaletteWeight(_stacked_shape(weights), first.scheme, read)


def _stacked_shape(weights: Sequence[StoredWeight]) -> tuple[int, ...]:
    first = weights[0]
    assert all((w.scheme, w.shape[1:]) == (first.scheme, first.shape[1:]) for w in weights)
    return (sum(w.rows for w in weights), *first.shape[1:])


def _rows_of(weights: Sequence[StoredWeight], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Which rows of which weights are rows [start, stop) of all: numbers and local ranges."""
    begin = 0
    for i, weight in enumerate(weights):
        if start < begin + weight.rows and stop > begin:
            yield i, max(start - begin, 0), min(stop - begin, weight.rows)
        begin += weight.rows


def float_weight(weights: MixedSource, name: str) -> Weight:
    """A weight that no plan quantizes: a norm, a bias."""
    weight = weights[name]
    assert isinstance(weight, Weight), f"'{name}' is quantized"
    return weight


def alike(kind: type[_T], weights: Sequence[AnyWeight]) -> list[_T]:
    """The weights if they are of a kind, which all of them are or none; else nothing."""
    found = [w for w in weights if isinstance(w, kind)]
    assert len(found) in (0, len(weights)), "weights that are stacked must be quantized alike"
    return found


def without_palettes(weights: MixedSource) -> AffineSource:
    """The weights for a target that has no tables.

    Raises:
        TargetError: Names a weight that has one.
    """
    kept: dict[str, Weight | QuantizedWeight] = {}
    for name, weight in weights.items():
        if isinstance(weight, PaletteWeight):
            raise TargetError(f"weight '{name}' is a palette, which this target cannot express")
        kept[name] = weight
    return kept
