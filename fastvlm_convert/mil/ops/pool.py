"""Pooling over 1 to 3 spatial axes; torch's kernels."""

import math
from collections.abc import Callable
from typing import Final

import torch
from torch.nn import functional

from fastvlm_convert.mil.ops.table import Ints, Rounding, Tensor, in_half, op
from fastvlm_convert.mil.ops.windows import Pads, padded, per_axis, spatial_axes, window_pads

_AVERAGE: Final[dict[int, Callable[..., Tensor]]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}
_MAX: Final[dict[int, Callable[..., Tensor]]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}


@op("max_pool")
def max_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str = "valid",
    strides: Ints | None = None,
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """The largest element of each window."""
    kernel, steps, pads, _ = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    wide = padded(x, pads, -torch.inf)
    return _MAX[len(kernel)](wide, kernel, steps)


@op("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str = "valid",
    strides: Ints | None = None,
    pad: Ints | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
    rounded: Rounding = None,
) -> Tensor:
    """The mean of each window; padding counts as zeros unless it is excluded."""
    kernel, steps, pads, beyond = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    total = in_half(rounded, _sums(x, kernel, steps, pads))
    if not exclude_padding_from_average and not any(beyond):
        return total / math.prod(kernel)
    # Elements beyond the padding, which ceil_mode adds, count in no case.
    ones = torch.ones_like(x[:1, :1])
    if not exclude_padding_from_average:
        given = tuple((a, b - more) for (a, b), more in zip(pads, beyond, strict=True))
        ones = padded(ones, given, 1.0)
        pads = tuple((0, more) for more in beyond)
    return total / _sums(ones, kernel, steps, pads)


@op("l2_pool")
def l2_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str = "valid",
    strides: Ints | None = None,
    pad: Ints | None = None,
    ceil_mode: bool = False,
    rounded: Rounding = None,
) -> Tensor:
    """The square root of the sum of squares of each window."""
    kernel, steps, pads, _ = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    squares = in_half(rounded, torch.square(x))
    return torch.sqrt(in_half(rounded, _sums(squares, kernel, steps, pads)))


def _sums(x: Tensor, kernel: tuple[int, ...], steps: tuple[int, ...], pads: Pads) -> Tensor:
    means = _AVERAGE[len(kernel)](padded(x, pads, 0.0), kernel, steps)
    return means * math.prod(kernel)


def _windows(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None,
    pad_type: str,
    pad: Ints | None,
    ceil_mode: bool,
) -> tuple[tuple[int, ...], tuple[int, ...], Pads, tuple[int, ...]]:
    """Kernel, strides, all padding, and the part of it at the end of each axis that only ceil_mode adds."""
    axes = spatial_axes(x)
    kernel = per_axis(kernel_sizes, axes, "kernel_sizes")
    steps = per_axis(strides, axes, "strides")
    pads = window_pads(pad_type, pad, x.shape[2:], kernel, steps, (1,) * axes)
    beyond = [0] * axes
    if ceil_mode:
        for i, (n, k, s, (a, b)) in enumerate(zip(x.shape[2:], kernel, steps, pads, strict=True)):
            count = -(-(n + a + b - k) // s) + 1
            if (count - 1) * s >= n + a:  # the last window would begin in the padding
                count -= 1
            beyond[i] = max((count - 1) * s + k - (n + a + b), 0)
        pads = tuple((a, b + more) for (a, b), more in zip(pads, beyond, strict=True))
    return kernel, steps, pads, tuple(beyond)
