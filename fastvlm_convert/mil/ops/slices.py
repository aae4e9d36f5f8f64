"""Slices, taken and replaced."""

from collections.abc import Sequence
from typing import NamedTuple

from fastvlm_convert.mil.ops.table import Bools, InPlace, Ints, Tensor, op

Index = tuple[slice | int, ...]


class Cut(NamedTuple):
    """What a slice takes of each axis; see `slice_by_index` of Core ML.

    Attributes:
        begin: First element; negative counts from the end.
        end: The one after the last, likewise.
        stride: Step; 1 by default.
        begin_mask: Axes that begin where they begin.
        end_mask: Axes that end where they end.
        squeeze_mask: Axes of which one element is taken, and which vanish.
    """

    begin: Ints
    end: Ints
    stride: Ints | None
    begin_mask: Bools | None
    end_mask: Bools | None
    squeeze_mask: Bools | None


def slices_of(shape: Sequence[int], cut: Cut) -> tuple[Index, tuple[int, ...]]:
    """The index of a slice, as numpy would take it; torch knows no negative steps.

    Args:
        shape: Of the tensor.
        cut: What it takes.

    Returns:
        The index with positive steps only, and the axes of the result to be reversed.

    Raises:
        ValueError: The arguments have other lengths than the shape, or a step is 0.
        IndexError: A squeezed axis has no such element.
    """
    begin, end, stride, begin_mask, end_mask, squeeze_mask = cut
    rank = len(shape)
    if any(v is not None and len(v) != rank for v in cut):
        raise ValueError(f"slicing {rank} axes with arguments of other lengths")
    index: list[slice | int] = []
    flipped = []
    for axis, n in enumerate(shape):
        step = 1 if stride is None else stride[axis]
        if step == 0:
            raise ValueError("a stride of 0")
        if squeeze_mask is not None and squeeze_mask[axis]:
            first = 0 if begin_mask is not None and begin_mask[axis] else begin[axis]
            if not -n <= first < n:
                raise IndexError(f"element {first} of an axis of {n}")
            index.append(first % n)
            continue
        low = None if begin_mask is not None and begin_mask[axis] else begin[axis]
        high = None if end_mask is not None and end_mask[axis] else end[axis]
        picked = range(n)[low:high:step]
        if not picked:
            index.append(slice(0, 0))
        elif step > 0:
            index.append(slice(picked[0], picked[-1] + 1, step))
        else:
            flipped.append(sum(isinstance(i, slice) for i in index))
            index.append(slice(picked[-1], picked[0] + 1, -step))
    return tuple(index), tuple(flipped)


@op("slice_by_index", moves=True)
def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    """x[begin:end:stride] along every axis, see `slices_of`."""
    index, flipped = slices_of(x.shape, Cut(begin, end, stride, begin_mask, end_mask, squeeze_mask))
    y = x[index]
    return y.flip(flipped) if flipped else y


@op("slice_update", moves=True)
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    in_place: InPlace,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    """X with a slice replaced by `update`, which has the shape of the slice."""
    y = x if in_place is InPlace.YES else x.clone()
    index, flipped = slices_of(x.shape, Cut(begin, end, stride, begin_mask, end_mask, squeeze_mask))
    if flipped:
        raise ValueError("slice_update with a negative stride")
    place = y[index]
    if place.numel() != update.numel():
        raise ValueError(f"the slice has shape {list(place.shape)}, the update {list(update.shape)}")
    place.copy_(update.reshape(place.shape))
    return y


@op("slice_by_size", moves=True)
def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """`size` elements of every axis from `begin` on; a size of -1 takes the rest."""
    if len(begin) != x.ndim or len(size) != x.ndim:
        raise ValueError(f"slicing {x.ndim} axes with {len(begin)} begins and {len(size)} sizes")
    index = []
    for n, first, count in zip(x.shape, begin, size, strict=True):
        start = first + n if first < 0 else first
        stop = n if count == -1 else start + count
        if not 0 <= start <= stop <= n:
            raise IndexError(f"elements {start} to {stop} of an axis of {n}")
        index.append(slice(start, stop))
    return x[tuple(index)]


@op("crop", moves=True)
def crop(x: Tensor, crop_height: Ints, crop_width: Ints) -> Tensor:
    """Without the first and last rows and columns that are given."""
    (top, bottom), (left, right) = crop_height, crop_width
    height, width = x.shape[-2:]
    if min(top, bottom, left, right) < 0:
        raise ValueError("a negative crop")
    return x[..., top : height - bottom, left : width - right]
