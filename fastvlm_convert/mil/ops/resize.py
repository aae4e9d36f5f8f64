"""Resizing the last two axes: sampling at positions along each axis, then interpolating."""

import math
from typing import Final

import torch

from fastvlm_convert.mil.ops.table import Ints, Limit, Tensor, op

_MODES: Final = frozenset(
    {"STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "UNALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS"}
)


def sample_points(low: Tensor, high: Tensor, count: int, mode: str) -> Tensor:
    """Where to sample along an axis.

    Args:
        low: float32 [n]: coordinate of the first element that counts, for each of n intervals.
        high: float32 [n]: the last one.
        count: How many points to sample in each.
        mode: A sampling mode of `resize_bilinear`.

    Returns:
        float32 [n, count].

    Raises:
        ValueError: The mode is unknown.
    """
    if mode not in _MODES:
        raise ValueError(f"unknown sampling_mode '{mode}'")
    step = torch.arange(count, dtype=torch.float32)
    low, reach = low[:, None], (high - low)[:, None]
    if mode == "OFFSET_CORNERS":
        delta = torch.clamp(reach, min=1.0) / count
        return low + 0.5 * delta + step * delta
    if mode == "UNALIGN_CORNERS":
        spacing = (reach + 1) / count
        return low + step * spacing + 0.5 * spacing - 0.5
    if mode == "DEFAULT":
        return low + step * (reach + 1) / count
    if count == 1:
        return low + (reach / 2 if mode == "ALIGN_CORNERS" else 0 * reach)
    return low + step * reach / (count - 1)


def _linear(x: Tensor, axis: int, points: Tensor) -> Tensor:
    n = x.shape[axis]
    points = points.clamp(0, n - 1)
    first = points.floor().long()
    share = (points - first).view([-1 if a == axis % x.ndim else 1 for a in range(x.ndim)])
    left = x.index_select(axis, first)
    right = x.index_select(axis, (first + 1).clamp(max=n - 1))
    return left + (right - left) * share


def _along(x: Tensor, axis: int, count: int, mode: str) -> Tensor:
    if x.shape[axis] == 0:
        raise ValueError("resizing an axis without elements")
    zero = torch.zeros(1)
    points = sample_points(zero, zero + (x.shape[axis] - 1), count, mode)[0]
    return _linear(x, axis % x.ndim, points)


def bilinear(x: Tensor, size: tuple[int, int], mode: str, limit: Limit) -> Tensor:
    """The last two axes at another size, interpolated linearly."""
    limit.check([*x.shape[:-2], *size])
    if min(size) < 1:
        raise ValueError(f"a target size of {size}")
    return _along(_along(x, -2, size[0], mode), -1, size[1], mode)


def nearest(x: Tensor, size: tuple[int, int], limit: Limit) -> Tensor:
    """The last two axes at another size: element floor(i * old / new)."""
    limit.check([*x.shape[:-2], *size])
    if min(size) < 1:
        raise ValueError(f"a target size of {size}")
    for axis, count in zip((-2, -1), size, strict=True):
        x = x.index_select(axis, torch.arange(count) * x.shape[axis] // count)
    return x


def _scaled(x: Tensor, height: float, width: float) -> tuple[int, int]:
    if not (math.isfinite(height) and math.isfinite(width)):
        raise ValueError(f"scale factors {height} and {width}")
    return math.floor(x.shape[-2] * height), math.floor(x.shape[-1] * width)


@op("resize_bilinear")
def resize_bilinear(
    x: Tensor,
    limit: Limit,
    target_size_height: int = 1,
    target_size_width: int = 1,
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """The last two axes at a given size, interpolated linearly."""
    return bilinear(x, (target_size_height, target_size_width), sampling_mode, limit)


@op("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    limit: Limit,
    scale_factor_height: float = 1.0,
    scale_factor_width: float = 1.0,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """The last two axes scaled, interpolated linearly."""
    size = _scaled(x, scale_factor_height, scale_factor_width)
    if align_corners:
        mode = "STRICT_ALIGN_CORNERS"
    else:
        mode = "DEFAULT" if half_pixel_centers is False else "UNALIGN_CORNERS"
    return bilinear(x, size, mode, limit)


@op("resize_nearest_neighbor", moves=True)
def resize_nearest_neighbor(
    x: Tensor, target_size_height: int, target_size_width: int, limit: Limit
) -> Tensor:
    """The last two axes at a given size, elements repeated or left out."""
    return nearest(x, (target_size_height, target_size_width), limit)


@op("upsample_nearest_neighbor", moves=True)
def upsample_nearest_neighbor(
    x: Tensor, limit: Limit, scale_factor_height: float = 1.0, scale_factor_width: float = 1.0
) -> Tensor:
    """The last two axes scaled, elements repeated or left out."""
    return nearest(x, _scaled(x, scale_factor_height, scale_factor_width), limit)


@op("resize")
def resize(
    x: Tensor,
    shape: Ints,
    resized_dims: int,
    limit: Limit,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """The last `resized_dims` axes at the sizes that end `shape`; 0 keeps a size."""
    if not 0 < resized_dims <= min(len(shape), x.ndim):
        raise ValueError(f"resized_dims is {resized_dims} for shape {shape}")
    axes = range(x.ndim - resized_dims, x.ndim)
    sizes = [n or x.shape[a] for a, n in zip(axes, shape[-resized_dims:], strict=True)]
    limit.check([*x.shape[: axes[0]], *sizes])
    if min(sizes) < 1 or interpolation_mode not in ("LINEAR", "NEAREST_NEIGHBOR"):
        raise ValueError(f"resizing to {sizes} with interpolation_mode '{interpolation_mode}'")
    for axis, count in zip(axes, sizes, strict=True):
        if interpolation_mode == "LINEAR":
            x = _along(x, axis, count, sampling_mode)
        else:
            x = x.index_select(axis, _nearest_points(x.shape[axis], count, sampling_mode))
    return x


def _nearest_points(size: int, count: int, mode: str) -> Tensor:
    if mode == "DEFAULT":
        return torch.arange(count) * size // count
    zero = torch.zeros(1)
    points = sample_points(zero, zero + (size - 1), count, mode)[0]
    return torch.floor(points + 0.5).long().clamp(0, size - 1)
