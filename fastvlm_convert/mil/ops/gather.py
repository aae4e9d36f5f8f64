"""Gathering and scattering by indices. Negative indices count from the end; others outside are errors."""

from typing import Final

import torch

from fastvlm_convert.mil.ops.table import Limit, Tensor, axis_of, broadcast, op

# How an update meets what is there; the order of equal indices does not matter.
_MODES: Final[dict[str, str]] = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}


def _positions(indices: Tensor, size: int) -> Tensor:
    """int64 indices from 0 to size - 1."""
    places = indices.long()
    places = torch.where(places < 0, places + size, places)
    if places.numel() and (int(places.min()) < 0 or int(places.max()) >= size):
        raise IndexError(f"indices from {int(indices.min())} to {int(indices.max())} of an axis of {size}")
    return places


@op("gather", moves=True)
def gather(
    x: Tensor,
    indices: Tensor,
    limit: Limit,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
) -> Tensor:
    """Rows of `axis`: [*batch, *before, n, *after], [*batch, *some] -> [*batch, *before, *some, *after]."""
    del validate_indices  # they always are
    axis = axis_of(axis, x.ndim)
    if not 0 <= batch_dims <= min(axis, indices.ndim):
        raise ValueError(f"batch_dims is {batch_dims}")
    picked = indices.shape[batch_dims:]
    limit.check([*x.shape[:axis], *picked, *x.shape[axis + 1 :]])
    places = _positions(indices, x.shape[axis])
    if batch_dims == 0:
        rows = x.index_select(axis, places.reshape(-1))
        return rows.reshape((*x.shape[:axis], *picked, *x.shape[axis + 1 :]))
    batch = x.shape[:batch_dims]
    flat = x.reshape(-1, *x.shape[batch_dims:])
    each = places.reshape(flat.shape[0], -1)
    rows = torch.stack([v.index_select(axis - batch_dims, i) for v, i in zip(flat, each, strict=True)])
    return rows.reshape((*batch, *x.shape[batch_dims:axis], *picked, *x.shape[axis + 1 :]))


@op("gather_along_axis", moves=True)
def gather_along_axis(
    x: Tensor, indices: Tensor, limit: Limit, axis: int = 0, validate_indices: bool = False
) -> Tensor:
    """One element of `axis` for every index, at the index's own place on the other axes."""
    del validate_indices
    axis = axis_of(axis, x.ndim)
    places = _positions(indices, x.shape[axis])
    shape = list(broadcast(*(_without(v.shape, axis) for v in (x, places))))
    limit.check([*shape[:axis], places.shape[axis], *shape[axis + 1 :]])
    return torch.take_along_dim(x, places, axis)


def _without(shape: torch.Size, axis: int) -> list[int]:
    return [1 if a == axis else n for a, n in enumerate(shape)]


@op("gather_nd", moves=True)
def gather_nd(
    x: Tensor, indices: Tensor, limit: Limit, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    """Slices of x at positions that the last axis of `indices` spells out."""
    del validate_indices
    depth = indices.shape[-1]
    if not 0 <= batch_dims < indices.ndim or batch_dims + depth > x.ndim:
        raise ValueError(f"batch_dims {batch_dims} and {depth} indices for {x.ndim} axes")
    limit.check([*indices.shape[:-1], *x.shape[batch_dims + depth :]])
    return x[(*_batch_grid(x, indices, batch_dims), *_spelled(x, indices, batch_dims))]


def _spelled(x: Tensor, indices: Tensor, first_axis: int) -> list[Tensor]:
    return [_positions(i, x.shape[first_axis + a]) for a, i in enumerate(indices.unbind(-1))]


def _batch_grid(x: Tensor, indices: Tensor, batch_dims: int) -> list[Tensor]:
    rank = indices.ndim - 1
    return [
        torch.arange(x.shape[a]).view([-1 if b == a else 1 for b in range(rank)]) for a in range(batch_dims)
    ]


@op("scatter")
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Data with rows of `axis` replaced by, or combined with, updates."""
    del validate_indices
    axis = axis_of(axis, data.ndim)
    places = _positions(indices, data.shape[axis]).reshape(-1)
    rows = updates.reshape(*data.shape[:axis], places.numel(), *data.shape[axis + 1 :])
    wide = places.view([-1 if a == axis else 1 for a in range(data.ndim)]).expand(rows.shape)
    return _combined(data, axis, wide, rows, mode)


@op("scatter_along_axis")
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Data with one element of `axis` for every index replaced by, or combined with, its update."""
    del validate_indices
    axis = axis_of(axis, data.ndim)
    places = _positions(indices, data.shape[axis])
    if updates.shape != places.shape:
        raise ValueError(f"indices of shape {list(places.shape)}, updates of {list(updates.shape)}")
    return _combined(data, axis, places, updates, mode)


@op("scatter_nd")
def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    """Data with slices replaced by, or combined with, updates.

    The last axis of `indices` spells a position out.
    """
    del validate_indices
    depth = indices.shape[-1]
    if depth > data.ndim:
        raise ValueError(f"{depth} indices for {data.ndim} axes")
    flat = data.reshape(-1, *data.shape[depth:])
    place = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for size, i in zip(data.shape[:depth], _spelled(data, indices, 0), strict=True):
        place = place * size + i
    rows = updates.reshape(place.numel(), *data.shape[depth:])
    wide = place.reshape([-1, *[1] * (flat.ndim - 1)]).expand(rows.shape)
    return _combined(flat, 0, wide, rows, mode).reshape(data.shape)


def _combined(data: Tensor, axis: int, places: Tensor, updates: Tensor, mode: str) -> Tensor:
    updates = updates.to(data.dtype)
    if mode == "update":
        return data.scatter(axis, places, updates)
    if mode == "sub":
        return data.scatter_reduce(axis, places, -updates, "sum")
    if mode == "div":
        return data.scatter_reduce(axis, places, torch.reciprocal(updates), "prod")
    if mode not in _MODES:
        raise ValueError(f"unknown mode '{mode}'")
    return data.scatter_reduce(axis, places, updates, _MODES[mode])
