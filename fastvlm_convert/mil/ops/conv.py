"""Convolutions; torch's kernels."""

from collections.abc import Callable
from typing import Final

import torch
from torch.nn import functional

from fastvlm_convert.mil.ops.table import Ints, Limit, Tensor, op
from fastvlm_convert.mil.ops.windows import (
    PADDED,
    explicit_pads,
    padded,
    per_axis,
    spatial_axes,
    symmetric,
    window_pads,
)

_CONV: Final[dict[int, Callable[..., Tensor]]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
_TRANSPOSED: Final[dict[int, Callable[..., Tensor]]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


@op("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    limit: Limit,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """Convolution over 1 to 3 spatial axes: [n, in, *size], [out, in / groups, *kernel] -> [n, out, ...]."""
    axes = spatial_axes(x)
    kernel = _kernel(weight, axes)
    steps = per_axis(strides, axes, "strides")
    spread = per_axis(dilations, axes, "dilations")
    if groups < 1:
        raise ValueError(f"groups is {groups}")
    pads = window_pads(pad_type, pad, x.shape[2:], kernel, steps, spread)
    own = symmetric(pads)
    if own is None:
        x, own = padded(x, pads, 0.0), (0,) * axes
    sizes = zip(x.shape[2:], kernel, steps, spread, own, strict=True)
    limit.check(
        [x.shape[0], weight.shape[0], *((n + 2 * p - (k - 1) * d - 1) // s + 1 for n, k, s, d, p in sizes)]
    )
    return _CONV[axes](x, weight, bias, steps, own, spread, groups)


@op("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    limit: Limit,
    bias: Tensor | None = None,
    pad: Ints | None = None,
    output_shape: Ints | None = None,
    pad_type: str = "valid",
    strides: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """Transposed convolution: [n, in, *size], [in, out / groups, *kernel] -> [n, out, *size].

    The full result is cropped by the padding; an `output_shape` larger than that ends in what the kernel
    reaches beyond it.
    """
    axes = spatial_axes(x)
    kernel = _kernel(weight, axes)
    steps = per_axis(strides, axes, "strides")
    spread = per_axis(dilations, axes, "dilations")
    full = [
        (n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(x.shape[2:], kernel, steps, spread, strict=True)
    ]
    if groups < 1:
        raise ValueError(f"groups is {groups}")
    PADDED.check([x.shape[0], weight.shape[1] * groups, *full])
    first, size = _crop(pad_type, pad, output_shape, x.shape[2:], full, steps)
    limit.check([x.shape[0], weight.shape[1] * groups, *size])
    y = _TRANSPOSED[axes](x, weight, None, steps, 0, 0, groups, spread)
    missing = [max(a + n - m, 0) for a, n, m in zip(first, size, full, strict=True)]
    if any(missing):
        y = functional.pad(y, [n for end in reversed(missing) for n in (0, end)])
    y = y[(slice(None), slice(None), *(slice(a, a + n) for a, n in zip(first, size, strict=True)))]
    return y if bias is None else y + bias.view(-1, *[1] * axes)


def _crop(
    pad_type: str,
    pad: Ints | None,
    output_shape: Ints | None,
    size: torch.Size,
    full: list[int],
    steps: tuple[int, ...],
) -> tuple[list[int], list[int]]:
    """Where the result begins in the full one, and its sizes."""
    axes = len(full)
    if pad_type in ("same", "same_lower"):
        wanted = [n * s for n, s in zip(size, steps, strict=True)]
        if output_shape is not None:
            wanted = list(output_shape[-axes:])
        over = [max(m - n, 0) for m, n in zip(full, wanted, strict=True)]
        return [n // 2 if pad_type == "same" else n - n // 2 for n in over], wanted
    if pad_type not in ("valid", "custom"):
        raise ValueError(f"unknown pad_type '{pad_type}'")
    pads = explicit_pads(pad if pad_type == "custom" else None, axes)
    cropped = [m - a - b for m, (a, b) in zip(full, pads, strict=True)]
    if output_shape is not None:
        cropped = list(output_shape[-axes:])
    return [a for a, _ in pads], cropped


def _kernel(weight: Tensor, axes: int) -> tuple[int, ...]:
    if weight.ndim != axes + 2 or 0 in weight.shape:
        raise ValueError(f"a weight of shape {list(weight.shape)} does not fit {axes} spatial axes")
    return tuple(weight.shape[2:])
