"""Pictures of any size to the encoder's pixels inside a graph: `preprocess.py`, bit for bit.

Pillow resizes one axis at a time, columns first, with 8 bits between. Each output is a sum of inputs near it,
whose weights are integers with 22 fractional bits; the sum is rounded and clipped. So is it here:

- The weights depend on the picture's size, so the graph computes them. They are fractions of integers, and
  int64 holds those exactly. (Browsers' build of ONNX Runtime for WebGPU has no float64.)
- The sums are products of 8-bit matrices with 32-bit sums: a weight is three digits. 32 outputs at a time
  share one matrix of the inputs near them, which is far less work than one matrix of the whole axis.
- The 256 values that a channel can have are looked up, so scaling and normalization are exact too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from fastvlm_convert.exporters.onnx.graph import Graph, tensor_type
from fastvlm_convert.io_names import PREPARED_PIXELS
from fastvlm_convert.preprocess import ImageSettings, Resampling, channel_values

_TOGETHER: Final = 32  # outputs that share a matrix; divides every image size
_FRACTION_BITS: Final = 22
# 22 bits of a quotient, a few at a time, so that a remainder so much larger still fits into int64.
_QUOTIENT_BITS: Final = (4, 4, 4, 4, 4, 2)
_MIDDLE: Final = 128  # zero point of the digits
_SIGNED_DIGITS: Final = _MIDDLE * (1 + 256 + 256**2)


@dataclass(frozen=True)
class _Axis:
    """How one axis is resized; values are int64 [1].

    Attributes:
        length: Pixels of the picture.
        padded: Pixels with the ground on both sides.
        before: Pixels of ground before the picture; None without any.
        outputs: Pixels after the resize.
        first: The first of them that is kept; None where all are.
    """

    length: str
    padded: str
    before: str | None
    outputs: str
    first: str | None


def prepare_pictures(graph: Graph, pictures: str, images: ImageSettings) -> str:
    """Add what makes the encoder's pixels of pictures.

    Args:
        graph: The graph.
        pictures: float32 [batch_size, 3, height, width], RGB in 0..1: 8-bit values divided by 255.
        images: How they are prepared; `RESIZED_IN_GRAPH` has their filter.

    Returns:
        float32 [batch_size, 3, S, S], equal to `preprocess.pixel_values`.
    """
    build, size = _Builder(graph, images), images.size
    shape = build.op("Shape", pictures, start=2, end=4)
    height, width = (build.op("Gather", shape, build.int64(axis)) for axis in (0, 1))
    scale = graph.constant("step_of_8_bits", np.array(1 / 255, np.float32))
    pixels = build.op("QuantizeLinear", pictures, scale, graph.constant("zero_uint8", np.array(0, np.uint8)))

    columns = build.op("Transpose", pixels, perm=[3, 0, 1, 2])
    resized = build.resize(columns, build.axis(width, height), height)
    by_channel = build.op("Concat", build.int64(size, -1), height, axis=0)
    rows = build.op("Transpose", build.op("Reshape", resized, by_channel), perm=[2, 1, 0])
    resized = build.resize(rows, build.axis(height, width), build.int64(size))
    square = build.op("Reshape", resized, build.int64(size, -1, 3, size))
    return build.scaled(build.op("Transpose", square, perm=[1, 2, 0, 3]))


class _Builder:
    """Adds operations whose names nobody looks up."""

    def __init__(self, graph: Graph, images: ImageSettings) -> None:
        self._graph = graph
        self._images = images
        self._count = 0

    def op(self, kind: str, *inputs: str, **attributes: int | list[int]) -> str:
        self._count += 1
        return self._graph.op(kind, f"picture_{self._count}", inputs, outputs=None, domain="", **attributes)

    def int64(self, *values: int) -> str:
        name = "_".join(str(value) for value in values)
        return self._graph.constant(f"int64_{name}", np.array(values, np.int64))

    def int32(self, value: int) -> str:
        return self._graph.constant(f"int32_{value}", np.array([value], np.int32))

    def cast(self, x: str, dtype: str) -> str:
        return self.op("Cast", x, to=tensor_type(dtype))

    def axis(self, length: str, other: str) -> _Axis:
        """How an axis is resized, given its own length and that of the other."""
        size, half = self.int64(self._images.size), self.int64(2)
        if self._images.mode == "pad":
            edge = self.op("Max", length, other)
            return _Axis(length, edge, self.op("Div", self.op("Sub", edge, length), half), size, None)
        short = self.op("Min", length, other)
        outputs = self.op("Div", self.op("Mul", length, size), short)
        return _Axis(length, length, None, outputs, self.op("Div", self.op("Sub", outputs, size), half))

    def resize(self, x: str, axis: _Axis, columns: str) -> str:
        """Resize the first axis; uint8 [n, ...] -> uint8 [S / 32, 32, the rest], flat.

        Args:
            x: Its remaining axes are batch, channel and one more, in this order, or the first two as one.
            axis: How.
            columns: Length of the last axis, int64 [1].
        """
        inputs, weights = self._weights(axis)
        flat = self.op("Reshape", x, self.int64(0, -1))
        place = inputs if axis.before is None else self.op("Sub", inputs, axis.before)
        ground = None
        if axis.before is not None:
            zero = self.int64(0)
            after_start = self.op("GreaterOrEqual", place, zero)
            inside = self.op("And", after_start, self.op("Less", place, axis.length))
            if any(self._images.ground):
                outside = self.op("Where", inside, zero, weights)
                total = self.op("ReduceSum", outside, self.int64(2), keepdims=1)
                ground = self.op("Mul", self.cast(total, "int32"), self._ground_of(flat, columns))
            weights = self.op("Where", inside, weights, zero)
        last = self.op("Sub", axis.length, self.int64(1))
        place = self.op("Min", self.op("Max", place, self.int64(0)), last)
        near = self.op("Gather", flat, self.op("Squeeze", place, self.int64(1)), axis=0)
        sums = self._sums(weights, near)
        return self._rounded(sums if ground is None else self.op("Add", sums, ground))

    def scaled(self, pixels: str) -> str:
        """8-bit values as the encoder gets them."""
        table = channel_values(self._images)
        index = self.cast(pixels, "int32")
        if (table == table[0]).all():
            table = table[:1]
        else:
            starts = np.arange(0, table.size, table.shape[1], np.int32).reshape(1, 3, 1, 1)
            index = self.op("Add", index, self._graph.constant("channel_starts", starts))
        values = self._graph.constant("channel_values", table.reshape(-1))
        return self._graph.op("Gather", PREPARED_PIXELS, [values, index], axis=0)

    def _weights(self, axis: _Axis) -> tuple[str, str]:
        """Which inputs are near the outputs, int64 [S / 32, 1, L], and their weights, int64 [S / 32, 32, L].

        An output's center is (2 o + 1) N / 2 M on the axis of N inputs, which are as wide as M outputs. With
        the distance from it in units of the filter, so of max(N, M) / M, every term is a fraction over
        2 max(N, M).
        """
        size, filters = self._images.size, _FILTERS[self._images.resampling]
        padded, outputs = axis.padded, axis.outputs
        odd = 2 * np.arange(size).reshape(-1, _TOGETHER, 1) + 1
        centers = self._graph.constant("odd_numbers", odd.astype(np.int64))
        if axis.first is not None:
            centers = self.op("Add", centers, self.op("Mul", axis.first, self.int64(2)))
        centers = self.op("Mul", centers, padded)
        widest, twice = self.op("Max", padded, outputs), self.op("Mul", outputs, self.int64(2))
        reach = self.op("Mul", widest, self.int64(2 * filters.support))

        first = self.op("Slice", centers, self.int64(0), self.int64(1), self.int64(1))
        start = self.op("Add", self.op("Sub", first, reach), outputs)
        start = self.op("Div", self.op("Max", start, self.int64(0)), twice)
        span = self.op("Mul", padded, self.int64(2 * (_TOGETHER - 1)))
        span = self.op("Add", span, self.op("Mul", reach, self.int64(2)))
        count = self.op("Add", self.op("Div", span, twice), self.int64(2))
        bounds = (self.op("Squeeze", value) for value in (self.int64(0), count, self.int64(1)))
        inputs = self.op("Add", start, self.op("Range", *bounds))

        middles = self.op("Add", self.op("Mul", inputs, self.int64(2)), self.int64(1))
        distance = self.op("Abs", self.op("Sub", self.op("Mul", middles, outputs), centers))
        weights = filters.weights(self, distance, self.op("Mul", widest, self.int64(2)))
        weights = self.op("Where", self.op("Less", inputs, padded), weights, self.int64(0))
        return inputs, self._normalized(weights)

    def _normalized(self, weights: str) -> str:
        """Weights over their sum, with 22 fractional bits, rounded half away from zero."""
        total = self.op("ReduceSum", weights, self.int64(2), keepdims=1)
        rest, quotient = self.op("Abs", weights), self.int64(0)
        for bits in _QUOTIENT_BITS:
            base = self.int64(1 << bits)
            rest = self.op("Mul", rest, base)
            quotient = self.op("Add", self.op("Mul", quotient, base), self.op("Div", rest, total))
            rest = self.op("Mod", rest, total)
        is_half = self.op("GreaterOrEqual", self.op("Mul", rest, self.int64(2)), total)
        rounded = self.op("Add", quotient, self.cast(is_half, "int64"))
        return self.op("Mul", rounded, self.op("Sign", weights))

    def _sums(self, weights: str, near: str) -> str:
        """int64 [S / 32, 32, L] times uint8 [S / 32, L, R]; int32 [S / 32, 32, R]."""
        rest, digits = self.op("Add", weights, self.int64(_SIGNED_DIGITS)), []
        for _ in range(2):
            digits.append(self.op("Mod", rest, self.int64(256)))
            rest = self.op("Div", rest, self.int64(256))
        stacked = self.op("Concat", *(self.cast(digit, "uint8") for digit in (rest, *digits[::-1])), axis=1)
        middle = self._graph.constant("middle_digit", np.array([_MIDDLE], np.uint8))
        product = self.op("MatMulInteger", stacked, near, middle)
        parts = [f"{product}_{digit}" for digit in ("high", "middle", "low")]
        self._graph.op("Split", f"{product}_digits", [product], outputs=parts, axis=1, num_outputs=3)
        high, low = parts[0], parts[1:]
        for part in low:
            high = self.op("Add", self.op("Mul", high, self.int32(256)), part)
        return high

    def _rounded(self, sums: str) -> str:
        """Sums with 22 fractional bits, rounded and clipped to 8-bit values."""
        rounded = self.op("Add", sums, self.int32(1 << (_FRACTION_BITS - 1)))
        most = self.int32((256 << _FRACTION_BITS) - 1)
        clipped = self.op("Min", self.op("Max", rounded, self.int32(0)), most)
        return self.cast(self.op("Div", clipped, self.int32(1 << _FRACTION_BITS)), "uint8")

    def _ground_of(self, flat: str, columns: str) -> str:
        """The color of the ground for every column of [n, batch * channel * columns]; int32 [1, R]."""
        values = np.array(self._images.ground, np.int32).reshape(1, 3, 1)
        ground = self._graph.constant("ground", values)
        width = self.op("Shape", flat, start=1, end=2)
        batch = self.op("Div", width, self.op("Mul", columns, self.int64(3)))
        shape = self.op("Concat", batch, self.int64(3), columns, axis=0)
        return self.op("Reshape", self.op("Expand", ground, shape), self.int64(1, -1))


@dataclass(frozen=True)
class _Filter:
    """One of Pillow's filters.

    Attributes:
        support: How far it reaches, in outputs or inputs, whichever are wider.
        weights: Its values, times a power of `unit`, at int64 distances a / unit.
    """

    support: int
    weights: Callable[[_Builder, str, str], str]


def _bilinear(build: _Builder, distance: str, unit: str) -> str:
    """1 - t, times the unit."""
    return build.op("Max", build.op("Sub", unit, distance), build.int64(0))


def _bicubic(build: _Builder, distance: str, unit: str) -> str:
    """1.5 t^3 - 2.5 t^2 + 1 below 1; -0.5 t^3 + 2.5 t^2 - 4 t + 2 below 2; times twice the unit cubed."""

    def times(x: str, factor: int) -> str:
        return build.op("Mul", x, build.int64(factor))

    square = build.op("Mul", unit, unit)
    cube = build.op("Mul", square, unit)
    near = build.op("Sub", times(distance, 3), times(unit, 5))
    near = build.op("Mul", build.op("Mul", near, distance), distance)
    near = build.op("Add", near, times(cube, 2))
    far = build.op("Mul", build.op("Sub", times(unit, 5), distance), distance)
    far = build.op("Mul", build.op("Sub", far, times(square, 8)), distance)
    far = build.op("Add", far, times(cube, 4))
    is_inside = build.op("Less", distance, times(unit, 2))
    beyond = build.op("Where", is_inside, far, build.int64(0))
    return build.op("Where", build.op("Less", distance, unit), near, beyond)


_FILTERS: Final[dict[Resampling, _Filter]] = {
    "bilinear": _Filter(1, _bilinear),
    "bicubic": _Filter(2, _bicubic),
}
RESIZED_IN_GRAPH: Final[tuple[Resampling, ...]] = tuple(_FILTERS)
