"""Lists of tensors, which loops fill."""

import math

import torch

from fastvlm_convert.mil.ops.table import Dimensions, Ints, Limit, List, Tensor, held_dtype, op
from fastvlm_convert.mil.types import element_named

_MAX_LENGTH = 1 << 16


def _check_length(length: int) -> None:
    if not 0 <= length <= _MAX_LENGTH:
        raise ValueError(f"a list of {length} elements; at most {_MAX_LENGTH} are possible")


@op("make_list", moves=True)
def make_list(
    elem_shape: Dimensions,
    limit: Limit,
    init_length: int = 1,
    dynamic_length: bool = True,
    dtype: str = "fp32",
) -> List:
    """A list of zeros. Where their shape is known only when it runs, the first one written decides it."""
    del dynamic_length
    _check_length(init_length)
    if any(n is None for n in elem_shape):
        return List([None] * init_length)
    shape = [n for n in elem_shape if n is not None]
    limit.check([init_length, *shape])
    kind = held_dtype(element_named(dtype, "dtype"))
    return List(torch.zeros(shape, dtype=kind) for _ in range(init_length))


def _check_list(ls: List) -> None:
    if not isinstance(ls, List):  # a program may wire anything to anything
        raise TypeError("not a list")


@op("list_length", moves=True)
def list_length(ls: List) -> Tensor:
    """How many tensors there are, int32."""
    _check_list(ls)
    return torch.tensor(len(ls), dtype=torch.int32)


@op("list_read", moves=True)
def list_read(ls: List, index: int) -> Tensor:
    """One tensor."""
    _check_list(ls)
    if not -len(ls) <= index < len(ls):
        raise IndexError(f"element {index} of a list of {len(ls)}")
    element = ls[index]
    if element is not None:
        return element
    written = next((e for e in ls if e is not None), None)
    if written is None:
        raise ValueError(f"element {index} of the list was never written, and its shape is not known")
    return torch.zeros_like(written)


@op("list_write", moves=True)
def list_write(ls: List, index: int, value: Tensor, limit: Limit) -> List:
    """The list with one tensor replaced; it grows when written beyond its end."""
    _check_list(ls)
    length = max(index + 1, len(ls))
    _check_length(length)
    if index < -len(ls):
        raise IndexError(f"element {index} of a list of {len(ls)}")
    limit.check([length, math.prod(value.shape)])
    written = List([*ls, *[None] * (length - len(ls))])
    written[index] = value
    return written


@op("list_gather", moves=True)
def list_gather(ls: List, indices: Ints, limit: Limit) -> Tensor:
    """Some tensors, stacked."""
    picked = [list_read(ls, i) for i in indices]
    limit.check([len(picked), picked[0].numel() if picked else 0])
    return torch.stack(picked)


@op("list_scatter", moves=True)
def list_scatter(ls: List, indices: Ints, value: Tensor, limit: Limit) -> List:
    """The list with some tensors replaced by the rows of another."""
    for index, row in zip(indices, value, strict=True):
        ls = list_write(ls, index, row, limit)
    return ls
