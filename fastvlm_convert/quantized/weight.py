"""A quantized weight: what a `WeightSource` holds where a recipe asks for integers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeGuard, TypeVar

import numpy as np

from fastvlm_convert.arithmetic import ceil_div, num_elements
from fastvlm_convert.errors import TargetError
from fastvlm_convert.quantized.activations import LayerScales
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme, PaletteMatrix, PaletteScheme
from fastvlm_convert.weights.source import CHUNK_BYTES, Weight

_S = TypeVar("_S", AffineScheme, PaletteScheme)
_M = TypeVar("_M", AffineMatrix, PaletteMatrix)


@dataclass(frozen=True)
class _RowsOnDemand(Generic[_S, _M]):
    """One quantized tensor, read on demand.

    Attributes:
        shape: Dimensions of the weight; rows are the first axis, columns all others.
        scheme: How it is quantized.
        read: Returns rows [start, stop), a multiple of `scheme.rows_together` but for the last.
    """

    shape: tuple[int, ...]
    scheme: _S
    read: Callable[[int, int], _M]

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Weights of one output channel."""
        return num_elements(self.shape[1:])

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows [start, stop) in parts of about `CHUNK_BYTES` of float32, which can be read alone."""
        together = self.scheme.rows_together
        step = max(1, CHUNK_BYTES // (4 * self.columns * together)) * together
        return ((first, min(first + step, stop)) for first in range(start, stop, step))

    def chunks(self) -> Iterator[_M]:
        """All rows, part by part."""
        return (self.read(start, stop) for start, stop in self.spans(0, self.rows))

    def watched(self, look: Callable[[int, int, _M], None]) -> Self:
        """The same weight; `look` is called with all rows [start, stop) that are read."""

        def read(start: int, stop: int) -> _M:
            matrix = self.read(start, stop)
            look(start, stop, matrix)
            return matrix

        return replace(self, read=read)

    def dense(self) -> Weight:
        """The same weight as the float32 that every target computes from it."""

        def read(start: int, stop: int) -> np.ndarray:
            together = self.scheme.rows_together
            first = start // together * together
            matrix = self.read(first, min(ceil_div(stop, together) * together, self.rows))
            return matrix.dequantized()[start - first : stop - first].reshape((stop - start, *self.shape[1:]))

        return Weight(self.shape, self.scheme.kind, read)


@dataclass(frozen=True)
class QuantizedWeight(_RowsOnDemand[AffineScheme, AffineMatrix]):
    """One tensor as integers with scales.

    Attributes:
        activations: How its layer rounds what it reads and gives; None where that stays in float.
    """

    activations: LayerScales | None = None


class PaletteWeight(_RowsOnDemand[PaletteScheme, PaletteMatrix]):
    """One tensor as indices into tables."""

    def matrix(self) -> PaletteMatrix:
        """All of it."""
        return self.read(0, self.rows)


StoredWeight = QuantizedWeight | PaletteWeight
AnyWeight = Weight | StoredWeight
MixedSource = Mapping[str, AnyWeight]
AffineSource = Mapping[str, Weight | QuantizedWeight]

_W = TypeVar("_W", QuantizedWeight, PaletteWeight)
_T = TypeVar("_T", Weight, QuantizedWeight, PaletteWeight)


def is_static(weight: AnyWeight) -> TypeGuard[QuantizedWeight]:
    """Whether a weight's layer multiplies integers."""
    return isinstance(weight, QuantizedWeight) and weight.activations is not None


def dense_view(weights: MixedSource) -> dict[str, Weight]:
    """Every weight as floats: what the reference computes with to judge the integers alone."""
    return {name: w if isinstance(w, Weight) else w.dense() for name, w in weights.items()}


def stacked(weights: Sequence[_W]) -> _W:
    """Several weights of one scheme and width, one above the other; each is whole groups."""
    first: _W = weights[0]
    if len(weights) == 1:
        return first
    assert all((w.scheme, w.shape[1:]) == (first.scheme, first.shape[1:]) for w in weights)
    assert all(w.rows % w.scheme.rows_together == 0 for w in weights)

    def read(start: int, stop: int) -> Any:  # noqa: ANN401  what the weights give
        parts = [weights[i].read(begin, end) for i, begin, end in _rows_of(weights, start, stop)]
        return type(parts[0]).joined(parts)

    return replace(first, shape=(sum(w.rows for w in weights), *first.shape[1:]), read=read)


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
