"""Changing shapes, joining, splitting and filling."""

import math

import torch
from torch.nn import functional

from fastvlm_convert.mil.ops.table import (
    Bools,
    Ints,
    Limit,
    Scalar,
    Target,
    Tensor,
    Tensors,
    axes_of,
    axis_of,
    held_dtype,
    op,
    positive,
)


@op("reshape", moves=True)
def reshape(x: Tensor, shape: Ints) -> Tensor:
    """X in another shape: -1 is what remains, 0 the size of the same axis of x, counted from the last.

    Up to iOS 16 zeros need a shape of x's own rank; since iOS 17 those beyond its first axis are 1.
    """
    if 0 in shape:
        sizes = (1,) * max(len(shape) - x.ndim, 0) + tuple(x.shape)[max(x.ndim - len(shape), 0) :]
        shape = tuple(n or size for n, size in zip(shape, sizes, strict=True))
    return x.reshape(shape)


@op("reshape_like", moves=True)
def reshape_like(x: Tensor, ref_tensors: Tensors, begins: Ints, ends: Ints, end_masks: Bools) -> Tensor:
    """X in a shape put together from pieces of other tensors' shapes."""
    shape: list[int] = []
    for ref, begin, end, to_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += ref.shape[begin : None if to_end else end]
    return x.reshape(shape)


@op("transpose", moves=True)
def transpose(x: Tensor, perm: Ints) -> Tensor:
    """The axes in another order."""
    return x.permute(perm)


@op("expand_dims", moves=True)
def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    """New axes of size 1; `axes` are their places in the result."""
    for axis in axes_of(axes, x.ndim + len(axes)):
        x = x.unsqueeze(axis)
    return x


@op("squeeze", moves=True)
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Without axes of size 1; others that are named stay."""
    return x.squeeze() if axes is None else x.squeeze(axes_of(axes, x.ndim))


@op("flatten2d", moves=True)
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    """Two axes: all before `axis`, and all from it on."""
    before = x.shape[:axis]
    return x.reshape(math.prod(before), math.prod(x.shape[len(before) :]))


@op("shape", moves=True)
def shape(x: Tensor) -> Tensor:
    """The sizes of the axes, int32."""
    return torch.tensor(x.shape, dtype=torch.int32)


@op("concat", moves=True)
def concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    """Tensors one after the other along an axis, or taking turns."""
    if values[0].ndim == 0:
        return torch.stack(values)
    if interleave:
        axis = axis_of(axis, values[0].ndim)
        return torch.stack(values, axis + 1).flatten(axis, axis + 1)
    return torch.cat(values, axis)


@op("stack", moves=True)
def stack(values: Tensors, axis: int) -> Tensor:
    """Tensors of one shape along a new axis."""
    return torch.stack(values, axis)


@op("split", moves=True)
def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None
) -> tuple[Tensor, ...]:
    """Pieces along an axis, equal or of given sizes."""
    axis = axis_of(axis, x.ndim)
    if split_sizes is not None:
        return torch.split(x, list(split_sizes), axis)
    if not num_splits or num_splits < 1 or x.shape[axis] % num_splits:
        raise ValueError(f"{x.shape[axis]} elements in {num_splits} equal pieces")
    return torch.split(x, x.shape[axis] // num_splits, axis)


@op("tile", moves=True)
def tile(x: Tensor, reps: Ints, limit: Limit) -> Tensor:
    """The tensor repeated along each axis."""
    if len(reps) != x.ndim:
        raise ValueError(f"{len(reps)} repetitions of {x.ndim} axes")
    limit.check([n * r for n, r in zip(x.shape, positive(reps, "reps"), strict=True)])
    return x.repeat(reps)


@op("reverse", moves=True)
def reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Backwards along the axes."""
    return x.flip(axes_of(axes, x.ndim))


@op("reverse_sequence", moves=True)
def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """The first `lengths[i]` elements of each sequence backwards."""
    seq, batch = axis_of(seq_axis, x.ndim), axis_of(batch_axis, x.ndim)
    rows = x.movedim((batch, seq), (0, 1))
    place = torch.arange(rows.shape[1]).expand(rows.shape[0], -1)
    last = lengths.long().view(-1, 1)
    picked = torch.where(place < last, last - 1 - place, place)
    turned = rows[torch.arange(rows.shape[0])[:, None], picked]
    return turned.movedim((0, 1), (batch, seq))


@op("pad", moves=True)
def pad(x: Tensor, pad: Ints, limit: Limit, mode: str = "constant", constant_val: Scalar = 0.0) -> Tensor:
    """More elements before and after the last axes: a constant, a mirror image, or the edge repeated."""
    if len(pad) % 2 or len(pad) > 2 * x.ndim or any(n < 0 for n in pad):
        raise ValueError(f"pad is {pad} for {x.ndim} axes")
    pairs = [(0, 0)] * (x.ndim - len(pad) // 2) + list(zip(pad[::2], pad[1::2], strict=True))
    limit.check([n + a + b for n, (a, b) in zip(x.shape, pairs, strict=True)])
    if mode == "constant":
        return functional.pad(x, [n for pair in reversed(pairs) for n in pair], value=constant_val)
    if mode not in ("reflect", "replicate"):
        raise ValueError(f"unknown mode '{mode}'")
    for axis, (before, after) in enumerate(pairs):
        if before or after:  # one axis after the other: torch takes at most three at once
            n = x.shape[axis]
            place = torch.arange(-before, n + after)
            mirrored = (n - 1) - ((n - 1) - place.abs()).abs()
            x = x.index_select(axis, place.clamp(0, n - 1) if mode == "replicate" else mirrored)
    return x


@op("fill", moves=True)
def fill(shape: Ints, target: Target, limit: Limit, value: Scalar = 0.0) -> Tensor:
    """One value everywhere."""
    return torch.full(tuple(limit.check(shape)), value, dtype=held_dtype(target))


@op("fill_like", moves=True)
def fill_like(ref_tensor: Tensor, target: Target, value: Scalar = 0.0) -> Tensor:
    """One value everywhere, in the shape of another tensor."""
    return torch.full(ref_tensor.shape, value, dtype=held_dtype(target))


@op("range_1d", moves=True)
def range_1d(end: Scalar, start: Scalar, step: Scalar, target: Target, limit: Limit) -> Tensor:
    """Start, start + step, ... below end."""
    if not step or not all(math.isfinite(v) for v in (end, start, step)):
        raise ValueError(f"a range from {start} to {end} by {step}")
    count = max(math.ceil((end - start) / step), 0)
    limit.check([count])
    return torch.arange(start, end, step, dtype=held_dtype(target))


@op("band_part", moves=True)
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Zero outside a band around the diagonal of the last two axes; negative is the whole triangle."""
    if lower >= 0:
        x = torch.triu(x, -lower)
    return torch.tril(x, upper) if upper >= 0 else x


@op("sliding_windows", moves=True)
def sliding_windows(x: Tensor, axis: int, size: int, limit: Limit, stride: int = 1) -> Tensor:
    """Windows along an axis, as a new axis after it."""
    axis = axis_of(axis, x.ndim)
    windows = x.unfold(axis, size, stride).movedim(-1, axis + 1)
    limit.check(windows.shape)
    return windows


@op("depth_to_space", moves=True)
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """Channels into squares of pixels; the block is the slowest part of the channels."""
    n, channels, height, width = x.shape
    (block,) = positive((block_size,), "block_size")
    blocks = x.reshape(n, block, block, channels // block**2, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, channels // block**2, height * block, width * block)


@op("space_to_depth", moves=True)
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """Squares of pixels into channels; the block is the slowest part of the channels."""
    n, channels, height, width = x.shape
    (block,) = positive((block_size,), "block_size")
    blocks = x.reshape(n, channels, height // block, block, width // block, block)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, channels * block**2, height // block, width // block)


@op("pixel_shuffle", moves=True)
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    """Channels into squares of pixels; the block is the fastest part of the channels."""
    return functional.pixel_shuffle(x, positive((upscale_factor,), "upscale_factor")[0])


@op("pixel_unshuffle", moves=True)
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    """Squares of pixels into channels; the block is the fastest part of the channels."""
    return functional.pixel_unshuffle(x, positive((downscale_factor,), "downscale_factor")[0])


@op("space_to_batch", moves=True)
def space_to_batch(x: Tensor, block_shape: Ints, paddings: Ints, limit: Limit) -> Tensor:
    """Pixels of each block into the batch, after padding with zeros."""
    (top, bottom, left, right), (rows, columns) = paddings, positive(block_shape, "block_shape")
    n, channels, height, width = x.shape
    if min(paddings) < 0:
        raise ValueError("a negative padding")
    limit.check([n, channels, height + top + bottom, width + left + right])
    wide = functional.pad(x, (left, right, top, bottom))
    high, broad = wide.shape[2] // rows, wide.shape[3] // columns
    blocks = wide.reshape(n, channels, high, rows, broad, columns)
    return blocks.permute(3, 5, 0, 1, 2, 4).reshape(n * rows * columns, channels, high, broad)


@op("batch_to_space", moves=True)
def batch_to_space(x: Tensor, block_shape: Ints, crops: Ints) -> Tensor:
    """The inverse of space_to_batch; the borders are cropped."""
    (top, bottom, left, right), (rows, columns) = crops, positive(block_shape, "block_shape")
    batch, channels, height, width = x.shape
    n = batch // (rows * columns)
    blocks = x.reshape(rows, columns, n, channels, height, width).permute(2, 3, 4, 0, 5, 1)
    whole = blocks.reshape(n, channels, height * rows, width * columns)
    if min(crops) < 0:
        raise ValueError("a negative crop")
    return whole[..., top : height * rows - bottom, left : width * columns - right]
