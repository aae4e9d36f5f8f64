"""Matrices wider than a device takes, in parts: equal ones, cut where their scheme allows it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from fastvlm_convert.arithmetic import ceil_div
from fastvlm_convert.quantized.schemes import AffineMatrix, PaletteMatrix
from fastvlm_convert.quantized.weight import AnyWeight, PaletteWeight, QuantizedWeight, alike, stacked
from fastvlm_convert.weights.source import Weight

Span = tuple[int, int]


def row_spans(weight: AnyWeight, widest: float) -> list[Span]:
    """Which output rows make parts of at most `widest`; one span if the weight has no more."""
    unit = 1 if isinstance(weight, Weight) else weight.scheme.rows_together
    return _spans(weight.shape[0], unit, widest)


def rows_of(weight: AnyWeight, span: Span) -> AnyWeight:
    """Some of a weight's rows."""
    first, end = span
    read: Any = weight.read

    def part(start: int, stop: int) -> Any:  # noqa: ANN401  what the weight gives
        return read(first + start, first + stop)

    return _like(weight, (end - first, *weight.shape[1:]), part)


def column_parts(weight: AnyWeight, widest: float) -> list[AnyWeight]:
    """Parts of at most `widest` input columns, side by side; the weight itself if it has no more.

    Whichever part is read first reads the weight, which is kept until the last part has been.
    """
    unit = weight.scheme.block_size or 1 if isinstance(weight, QuantizedWeight) else 1
    spans = _spans(weight.shape[1], unit, widest)
    if len(spans) == 1:
        return [weight]
    whole = _ReadOnce(weight, len(spans))
    return [_columns(weight, span, whole) for span in spans]


def joined(weights: Sequence[AnyWeight]) -> AnyWeight:
    """Several weights of one kind and width as one, stacked along their output rows."""
    if len(weights) == 1:
        return weights[0]
    if integers := alike(QuantizedWeight, weights):
        return stacked(integers)
    if palettes := alike(PaletteWeight, weights):
        return stacked(palettes)
    floats = alike(Weight, weights)
    ends = np.cumsum([w.shape[0] for w in floats]).tolist()

    def read(start: int, stop: int) -> np.ndarray:
        found = []
        for weight, end in zip(floats, ends, strict=True):
            first = end - weight.shape[0]
            if start < end and stop > first:
                found.append(weight.read(max(start - first, 0), min(stop, end) - first))
        return np.concatenate(found)

    return Weight((ends[-1], *floats[0].shape[1:]), floats[0].dtype, read)


def _spans(length: int, unit: int, widest: float) -> list[Span]:
    """Equal parts of a length, each whole units but for the last."""
    if length <= widest:
        return [(0, length)]
    units = ceil_div(length, unit)
    count = ceil_div(units, max(1, int(widest) // unit))
    return list(pairwise(min(length, unit * (units * i // count)) for i in range(count + 1)))


def _columns(weight: AnyWeight, span: Span, whole: "_ReadOnce") -> AnyWeight:
    rows, (first, end) = weight.shape[0], span

    def read(start: int, stop: int) -> Any:  # noqa: ANN401  what the weight gives
        return _cut(whole.rows(start, stop), span)

    return _like(weight, (rows, end - first, *weight.shape[2:]), read)


def _like(weight: AnyWeight, shape: tuple[int, ...], read: Any) -> AnyWeight:  # noqa: ANN401
    """A weight of the same kind; `read` returns what the weight's own does."""
    return replace(weight, shape=shape, read=read)


def _cut(rows: Any, span: Span) -> Any:  # noqa: ANN401  what a weight gives
    """Columns of rows."""
    first, end = span
    if isinstance(rows, PaletteMatrix):
        return replace(rows, indices=rows.indices[:, first:end])
    if isinstance(rows, AffineMatrix):
        size = rows.scheme.block_size
        blocks = slice(None) if size is None else slice(first // size, end // size)
        return replace(
            rows, q=rows.q[:, first:end], scale=rows.scale[:, blocks], zero_point=rows.zero_point[:, blocks]
        )
    return np.ascontiguousarray(rows[:, first:end])


class _ReadOnce:
    """A weight that is read at the first wish for any of its rows, and let go after the last of all parts."""

    def __init__(self, weight: AnyWeight, num_parts: int) -> None:
        self._weight = weight
        self._parts_left = num_parts
        self._content: Any = None

    def rows(self, start: int, stop: int) -> Any:  # noqa: ANN401  what the weight gives
        if self._content is None:
            parts: list[Any] = list(self._weight.chunks())
            is_float = isinstance(parts[0], np.ndarray)
            self._content = np.concatenate(parts) if is_float else type(parts[0]).joined(parts)
        content = self._content
        if stop == self._weight.shape[0]:
            self._parts_left -= 1
            if not self._parts_left:
                self._content = None
        return content[start:stop] if isinstance(content, np.ndarray) else content.read(start, stop)
