"""Reductions along axes. In float16 sums are rounded, so that they overflow where float16 does."""

import math
from collections.abc import Callable

import torch

from fastvlm_convert.mil.ops.table import (
    Ints,
    Rounding,
    Tensor,
    axes_of,
    axis_of,
    in_half,
    op,
)

Reduce = Callable[[Tensor, tuple[int, ...], bool, Rounding], Tensor]


def sum_of(x: Tensor, axes: tuple[int, ...], keep_dims: bool, rounded: Rounding) -> Tensor:
    """The sum; integers stay int32."""
    if not axes:
        return x
    return in_half(rounded, x.sum(axes, keepdim=keep_dims, dtype=x.dtype))


def mean_of(x: Tensor, axes: tuple[int, ...], keep_dims: bool, rounded: Rounding) -> Tensor:
    """The mean: the sum divided by the count. In float32 it is one kernel."""
    if rounded is None and x.is_floating_point() and axes:
        return x.mean(axes, keepdim=keep_dims)
    count = math.prod(x.shape[axis] for axis in axes)
    total = sum_of(x, axes, keep_dims, rounded)
    return total / count if x.is_floating_point() else (total.double() / count).to(x.dtype)


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep_dims: bool, rounded: Rounding) -> Tensor:
    if rounded is None:
        return torch.logsumexp(x, axes, keepdim=keep_dims)
    top = x.amax(axes, keepdim=True)
    powers = rounded(torch.exp(rounded(x - top)))
    total = rounded(torch.log(sum_of(powers, axes, True, rounded))) + top
    return total if keep_dims else total.squeeze(axes)


def _prod(x: Tensor, axes: tuple[int, ...], keep_dims: bool, rounded: Rounding) -> Tensor:
    del rounded  # the result is rounded, like that of every operation
    for axis in reversed(axes):
        x = torch.prod(x, axis, keepdim=keep_dims, dtype=x.dtype)
    return x


_REDUCTIONS: dict[str, Reduce] = {
    "reduce_l1_norm": lambda x, axes, keep, r: sum_of(x.abs(), axes, keep, r),
    "reduce_l2_norm": lambda x, axes, keep, r: torch.sqrt(sum_of(in_half(r, torch.square(x)), axes, keep, r)),
    "reduce_log_sum": lambda x, axes, keep, r: torch.log(sum_of(x, axes, keep, r)),
    "reduce_log_sum_exp": _log_sum_exp,
    "reduce_max": lambda x, axes, keep, r: torch.amax(x, axes, keepdim=keep),
    "reduce_mean": mean_of,
    "reduce_min": lambda x, axes, keep, r: torch.amin(x, axes, keepdim=keep),
    "reduce_prod": _prod,
    "reduce_sum": sum_of,
    "reduce_sum_square": lambda x, axes, keep, r: sum_of(in_half(r, torch.square(x)), axes, keep, r),
}


def _reduction(reduce: Reduce) -> Callable[..., Tensor]:
    def compute(
        x: Tensor, axes: Ints | None = None, keep_dims: bool = False, rounded: Rounding = None
    ) -> Tensor:
        return reduce(x, axes_of(axes, x.ndim), keep_dims, rounded)

    return compute


for _name, _reduce in _REDUCTIONS.items():
    op(_name)(_reduction(_reduce))


@op("reduce_argmax")
def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """Position of the first largest element along an axis."""
    del output_dtype  # all integers are held as int32
    return torch.argmax(x, axis_of(axis, x.ndim), keepdim=keep_dims).int()


@op("reduce_argmin")
def reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """Position of the first smallest element along an axis."""
    del output_dtype
    return torch.argmin(x, axis_of(axis, x.ndim), keepdim=keep_dims).int()


@op("cumsum")
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """Sums of the elements up to each; exclusive leaves the element itself out."""
    axis = axis_of(axis, x.ndim)
    forward = x.flip(axis) if reverse else x
    total = torch.cumsum(forward, axis, dtype=x.dtype)
    if exclusive:
        total = total - forward
    return total.flip(axis) if reverse else total
