"""Quantizing and dequantizing values while running."""

import torch

from fastvlm_convert.mil.ops.table import Tensor, axis_of, op


def _along(values: Tensor, axis: int | None, rank: int) -> Tensor:
    """Scalars as they are; one value a row of `axis` in a shape that broadcasts."""
    if values.ndim == 0:
        return values
    if axis is None or values.ndim != 1:
        raise ValueError("scale and zero_point must be scalars, or vectors with an axis")
    return values.view([-1 if a == axis_of(axis, rank) else 1 for a in range(rank)])


@op("quantize")
def quantize(
    input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    """round(input / scale) + zero_point, kept within int8 or uint8; halves go to even, as in coremltools."""
    if output_dtype not in ("int8", "uint8"):
        raise ValueError(f"output_dtype is '{output_dtype}'")
    low, high = (-128, 127) if output_dtype == "int8" else (0, 255)
    q = torch.round(input / _along(scale, axis, input.ndim))
    if zero_point is not None:
        q = q + _along(zero_point, axis, input.ndim)
    return torch.nan_to_num(q).clamp(low, high).int()


@op("dequantize")
def dequantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    """Scale * (input - zero_point)."""
    q = input if zero_point is None else input - _along(zero_point, axis, input.ndim)
    return q.float() * _along(scale, axis, input.ndim)
