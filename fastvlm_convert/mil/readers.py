"""Inputs of operations that are plain Python values, read from tensors or from constants."""

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.constants import Constant
from fastvlm_convert.mil.ops.table import Kind


def _ints(x: torch.Tensor) -> tuple[int, ...]:
    if x.is_floating_point():
        raise TypeError("whole numbers are needed, not floats")
    return tuple(int(v) for v in x.reshape(-1).tolist())


def _one(x: torch.Tensor) -> Any:  # noqa: ANN401
    if x.numel() != 1:
        raise ValueError(f"one number is needed, not {list(x.shape)}")
    return x.item()


READERS: Final[dict[Kind, Callable[[torch.Tensor], Any]]] = {
    Kind.INTS: _ints,
    Kind.FLOATS: lambda x: tuple(float(v) for v in x.reshape(-1).tolist()),
    Kind.BOOLS: lambda x: tuple(bool(v) for v in x.reshape(-1).tolist()),
    Kind.INT: lambda x: int(_one(x)),
    Kind.FLOAT: lambda x: float(_one(x)),
    Kind.BOOL: lambda x: bool(_one(x)),
    Kind.SCALAR: _one,
}


def read_constant(constant: Constant, kind: Kind, what: str) -> Any:  # noqa: ANN401
    """A constant as a plain Python value."""
    value = constant.load()
    if kind in (Kind.STR, Kind.STRINGS):
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, np.ndarray) or (kind is Kind.STR and len(texts) != 1):
            raise BundleError(f"{what} takes text")
        return texts[0] if kind is Kind.STR else tuple(texts)
    if not isinstance(value, np.ndarray):
        raise BundleError(f"{what} takes numbers, not text")
    flat = value.reshape(-1)
    if kind is Kind.INTS:
        if value.dtype.kind == "f":
            raise BundleError(f"{what} takes whole numbers")
        return tuple(int(v) for v in flat.tolist())
    if kind is Kind.FLOATS:
        return tuple(float(v) for v in flat.tolist())
    if kind is Kind.BOOLS:
        return tuple(bool(v) for v in flat.tolist())
    if flat.size != 1 or (kind is Kind.INT and not math.isfinite(flat[0])):
        raise BundleError(f"{what} takes one number, not {list(value.shape)}")
    number = flat[0].item()
    return {Kind.INT: int, Kind.FLOAT: float, Kind.BOOL: bool}.get(kind, lambda v: v)(number)
