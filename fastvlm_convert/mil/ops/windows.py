"""What convolutions and poolings share: padding of sliding windows."""

from collections.abc import Sequence
from typing import Final

import torch
from torch.nn import functional

from fastvlm_convert.mil.ops.table import Limit, positive

Pads = tuple[tuple[int, int], ...]

# Padding may make a tensor larger than both input and output, but never out of proportion.
PADDED: Final = Limit(1 << 29)


def per_axis(values: Sequence[int] | None, axes: int, what: str) -> tuple[int, ...]:
    """One positive number a spatial axis; 1 by default.

    Raises:
        ValueError: There are more or fewer, or one is not positive.
    """
    if values is None:
        return (1,) * axes
    if len(values) != axes:
        raise ValueError(f"{what} has {len(values)} numbers for {axes} spatial axes")
    return positive(values, what)


def spatial_axes(x: torch.Tensor) -> int:
    """How many axes follow batch and channels.

    Raises:
        ValueError: There are none, or more than three.
    """
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"expected 1 to 3 spatial axes after batch and channels, got shape {list(x.shape)}")
    return x.ndim - 2


def window_pads(
    pad_type: str,
    pad: Sequence[int] | None,
    size: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> Pads:
    """Padding before and after each spatial axis.

    `same` gives ceil(size / stride) windows and puts an odd element at the end, `same_lower` at the start.

    Args:
        pad_type: `valid`, `same`, `same_lower` or `custom`.
        pad: Before and after each axis; read for `custom` only.
        size: Sizes of the spatial axes.
        kernel: Sizes of the window.
        strides: Steps of the window.
        dilations: Distances within the window.

    Raises:
        ValueError: The type is unknown or `pad` does not fit it.
    """
    if pad_type == "valid":
        return ((0, 0),) * len(size)
    if pad_type == "custom":
        return explicit_pads(pad, len(size))
    if pad_type not in ("same", "same_lower"):
        raise ValueError(f"unknown pad_type '{pad_type}'")
    pads = []
    for n, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-n // stride) - 1) * stride + (k - 1) * dilation + 1 - n, 0)
        less, more = total // 2, total - total // 2
        pads.append((less, more) if pad_type == "same" else (more, less))
    return tuple(pads)


def explicit_pads(pad: Sequence[int] | None, axes: int) -> Pads:
    """Padding given as before and after each axis.

    Raises:
        ValueError: It has another length, or is negative.
    """
    flat = (0,) * (2 * axes) if pad is None else tuple(pad)
    if len(flat) != 2 * axes or min(flat) < 0:
        raise ValueError(f"pad is {flat}, expected {2 * axes} numbers of at least 0")
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def symmetric(pads: Pads) -> tuple[int, ...] | None:
    """The padding a kernel can do itself, equal on both sides; else None."""
    return tuple(before for before, _ in pads) if all(a == b for a, b in pads) else None


def padded(x: torch.Tensor, pads: Pads, value: float) -> torch.Tensor:
    """The tensor with its spatial axes padded.

    Raises:
        ValueError: It has more elements than `PADDED` allows.
    """
    if not any(a or b for a, b in pads):
        return x
    PADDED.check([*x.shape[:2], *(n + a + b for n, (a, b) in zip(x.shape[2:], pads, strict=True))])
    return functional.pad(x, [n for pair in reversed(pads) for n in pair], value=value)
