"""Inputs of operations that are plain Python values, read from tensors or from constants."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.constants import Constant
from fastvlm_convert.mil.ops.table import Kind

_TEXT: Final = frozenset({Kind.STR, Kind.STRINGS})


class UnreadableError(ValueError):
    """A tensor is not the plain value that an input takes; the text completes `input 'axis' ...`."""


def _whole(value: Any) -> int:  # noqa: ANN401  a bool, an int or a float
    if isinstance(value, float) and not value.is_integer():  # infinity and NaN are no integers either
        raise UnreadableError(f"takes whole numbers, not {value}")
    return int(value)


def _ints(values: list[Any]) -> tuple[int, ...]:
    if any(isinstance(v, float) for v in values):
        raise UnreadableError("takes whole numbers")
    return tuple(int(v) for v in values)


def _one(values: list[Any]) -> Any:  # noqa: ANN401
    if len(values) != 1:
        raise UnreadableError(f"takes one number, not {len(values)}")
    return values[0]


_PLAIN: Final[dict[Kind, Callable[[list[Any]], Any]]] = {
    Kind.INTS: _ints,
    Kind.FLOATS: lambda values: tuple(float(v) for v in values),
    Kind.BOOLS: lambda values: tuple(bool(v) for v in values),
    Kind.INT: lambda values: _whole(_one(values)),
    Kind.FLOAT: lambda values: float(_one(values)),
    Kind.BOOL: lambda values: bool(_one(values)),
    Kind.SCALAR: _one,
}


def _reader(plain: Callable[[list[Any]], Any]) -> Callable[[torch.Tensor], Any]:
    return lambda x: plain(x.reshape(-1).tolist())


READERS: Final = {kind: _reader(plain) for kind, plain in _PLAIN.items()}
CONSTANT_KINDS: Final = frozenset({*READERS, *_TEXT, Kind.LABELS, Kind.DIMENSIONS})


def read_constant(constant: Constant, kind: Kind, what: str) -> Any:  # noqa: ANN401
    """A constant as a plain Python value of one of `CONSTANT_KINDS`.

    Raises:
        BundleError: It is of another kind.
    """
    value = constant.load()
    if kind is Kind.LABELS:
        if not isinstance(value, list):
            raise BundleError(f"{what} takes a list of labels")
        return tuple(value)
    if kind is Kind.DIMENSIONS:  # one of several; text names a size that is known only when it runs
        return (None,) if isinstance(value, str) else read_constant(constant, Kind.INTS, what)
    if kind in _TEXT:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, np.ndarray) or (kind is Kind.STR and len(texts) != 1):
            raise BundleError(f"{what} takes text")
        return texts[0] if kind is Kind.STR else tuple(texts)
    if not isinstance(value, np.ndarray):
        raise BundleError(f"{what} takes numbers, not text")
    try:
        return _PLAIN[kind](value.reshape(-1).tolist())
    except UnreadableError as error:
        raise BundleError(f"{what} {error}") from error
