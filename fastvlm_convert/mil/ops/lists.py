"""Lists of tensors, which loops fill."""

import torch

from fastvlm_convert.mil.ops.table import Ints, Limit, List, Tensor, op


@op("make_list", moves=True)
def make_list(
    elem_shape: Ints,
    limit: Limit,
    init_length: int = 1,
    dynamic_length: bool = True,
    dtype: str = "fp32",
) -> List:
    """A list of zeros."""
    del dynamic_length
    limit.check([init_length, *elem_shape])
    kind = torch.float32 if dtype.startswith("fp") else torch.bool if dtype == "bool" else torch.int32
    return List(torch.zeros(elem_shape, dtype=kind) for _ in range(init_length))


@op("list_length", moves=True)
def list_length(ls: List) -> Tensor:
    """How many tensors there are, int32."""
    return torch.tensor(len(ls), dtype=torch.int32)


@op("list_read", moves=True)
def list_read(ls: List, index: int) -> Tensor:
    """One tensor."""
    return ls[index]


@op("list_write", moves=True)
def list_write(ls: List, index: int, value: Tensor, limit: Limit) -> List:
    """The list with one tensor replaced; it grows when written beyond its end."""
    limit.check([index + 1])
    written = List([*ls, *[torch.zeros_like(value)] * (index + 1 - len(ls))])
    written[index] = value
    return written


@op("list_gather", moves=True)
def list_gather(ls: List, indices: Ints, limit: Limit) -> Tensor:
    """Some tensors, stacked."""
    picked = [ls[i] for i in indices]
    limit.check([len(picked), picked[0].numel() if picked else 0])
    return torch.stack(picked)


@op("list_scatter", moves=True)
def list_scatter(ls: List, indices: Ints, value: Tensor, limit: Limit) -> List:
    """The list with some tensors replaced by the rows of another."""
    for index, row in zip(indices, value, strict=True):
        ls = list_write(ls, index, row, limit)
    return ls
