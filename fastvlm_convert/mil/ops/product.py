"""Products of matrices. They accumulate in float32; in float16 the result is rounded."""

import torch
from torch.nn import functional

from fastvlm_convert.mil.ops.table import Limit, Tensor, Tensors, broadcast, op


@op("linear")
def linear(x: Tensor, weight: Tensor, limit: Limit, bias: Tensor | None = None) -> Tensor:
    """X @ weight^T + bias: [*, in], [out, in] -> [*, out]."""
    limit.check([*x.shape[:-1], weight.shape[0]])
    return functional.linear(x, weight, bias)


@op("matmul")
def matmul(
    x: Tensor, y: Tensor, limit: Limit, transpose_x: bool = False, transpose_y: bool = False
) -> Tensor:
    """X @ y over the last two axes, the others broadcast; a vector is a row, or as y a column."""
    a = x.mT if transpose_x and x.ndim > 1 else x
    b = y.mT if transpose_y and y.ndim > 1 else y
    rows = a.shape[-2:-1]
    columns = b.shape[-1:] if b.ndim > 1 else ()
    limit.check([*broadcast(a.shape[:-2], b.shape[:-2]), *rows, *columns])
    if a.is_floating_point():
        return torch.matmul(a, b)
    return torch.matmul(a.long(), b.long()).int()


@op("einsum")
def einsum(values: Tensors, equation: str, limit: Limit) -> Tensor:
    """The sum of products that the equation describes."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if arrow and "..." not in equation and len(terms) == len(values):
        sizes = {
            letter: n
            for term, value in zip(terms, values, strict=True)
            for letter, n in zip(term, value.shape, strict=True)
        }
        limit.check([sizes[letter] for letter in right])
    return torch.einsum(equation, *values)
