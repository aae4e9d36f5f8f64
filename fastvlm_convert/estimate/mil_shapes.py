"""Shapes that ML programs leave open until they run, and how often operations multiply."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from fastvlm_convert.arithmetic import ceil_div, num_elements

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operand:
    """What is known of a value before anything runs.

    Attributes:
        shape: Its dimensions.
        bits: Of an element; 0 for what is no tensor of numbers.
        numbers: Its integers where they stand in the program, flat; None for one that a call decides.
        weights: The stored arrays that it is made of, and of nothing else; empty for what a call computes.
    """

    shape: Shape
    bits: int
    numbers: tuple[int | None, ...] | None = None
    weights: frozenset[object] = frozenset()

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return ceil_div(num_elements(self.shape) * self.bits, 8)

    @property
    def is_stored(self) -> bool:
        """Whether no call decides any of it."""
        is_setting = self.numbers is not None and None not in self.numbers
        return bool(self.weights) or is_setting or self.bits == 0


Operands = Mapping[str, tuple[Operand, ...]]

MULTIPLIES: Final = frozenset({"conv", "linear", "matmul", "scaled_dot_product_attention"})
# Their open dimensions are the tokens of the call, unless their inputs say otherwise.
_CUT: Final = frozenset({"gather", "slice_by_index", "slice_by_size"})
# Their open dimensions are those of their inputs, one axis beside the other from the last.
_ALIGNED: Final = frozenset(
    {
        "abs", "add", "cast", "gelu", "identity", "less_equal", "linear", "logical_and", "maximum", "minimum",
        "mul", "real_div", "reduce_max", "reduce_mean", "rsqrt", "select", "silu", "softmax", "split",
        "square", "sub",
    }
)  # fmt: skip


def resolved(kind: str, declared: tuple[int | None, ...], operands: Operands, tokens: int) -> Shape:
    """The shape of a result, whose open dimensions depend on the call.

    Args:
        kind: The operation.
        declared: The shape that the program declares.
        operands: Its inputs, by parameter.
        tokens: Tokens of the call.

    Raises:
        ValueError: Nothing is known of such dimensions of this operation.
    """
    known = tuple(n for n in declared if n is not None)
    if len(known) == len(declared):
        return known
    if kind in _CUT:
        said = _cut(operands) or declared
        return tuple(tokens if n is None else n for n in said)
    if kind == "reshape":
        whole, rest = num_elements(operands["x"][0].shape), num_elements(known)
        if len(known) < len(declared) - 1 or whole % rest:
            raise ValueError(f"{list(operands['x'][0].shape)} as {list(declared)}")
        return tuple(whole // rest if n is None else n for n in declared)
    full = _full(kind, operands)
    if len(full) < len(declared):
        raise ValueError(f"nothing is known of the open dimensions of {kind}")
    tail = full[len(full) - len(declared) :]
    return tuple(tail[axis] if n is None else n for axis, n in enumerate(declared))


def _cut(operands: Operands) -> tuple[int | None, ...]:
    """What is left between a beginning and an end; None where a call decides one of them."""
    begin, end = (operands[key][0].numbers if key in operands else None for key in ("begin", "end"))
    if begin is None or end is None or "begin_mask" in operands or "end_mask" in operands:
        return ()
    return tuple(
        None if first is None or last is None else last - first
        for first, last in zip(begin, end, strict=True)
    )


def joined_numbers(operands: Operands) -> tuple[int | None, ...] | None:
    """The integers of a list that `concat` joins; None where a call decides."""
    values = operands["values"]
    if any(len(value.shape) != 1 for value in values):
        return None
    return tuple(n for value in values for n in value.numbers or (None,) * value.shape[0])


def _full(kind: str, operands: Operands) -> Shape:
    if kind == "transpose":
        x, perm = operands["x"][0], operands["perm"][0].numbers or ()
        return tuple(x.shape[axis] for axis in perm if axis is not None)
    if kind == "concat":
        values = operands["values"]
        axis = ((operands["axis"][0].numbers or (0,))[0] or 0) % len(values[0].shape)
        total = sum(value.shape[axis] for value in values)
        return tuple(total if i == axis else n for i, n in enumerate(values[0].shape))
    if kind == "scaled_dot_product_attention":
        return (*operands["query"][0].shape[:-1], operands["value"][0].shape[-1])
    if kind == "matmul":
        left, right = _factors(operands)
        return (*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1])
    if kind == "linear":
        return operands["x"][0].shape
    if kind in _ALIGNED:
        named = ("x", "y", "a", "b", "cond")
        return np.broadcast_shapes(*(operands[key][0].shape for key in named if key in operands))
    return ()


def _factors(operands: Operands) -> tuple[Shape, Shape]:
    x, y = (
        (*shape[:-2], shape[-1], shape[-2]) if any(flag) else shape
        for shape, flag in (
            (operands[key][0].shape, operands[f"transpose_{key}"][0].numbers or ())
            if f"transpose_{key}" in operands
            else (operands[key][0].shape, ())
            for key in ("x", "y")
        )
    )
    return x, y


def macs_of(kind: str, operands: Operands, result: Shape) -> int:
    """Multiply-accumulates of one of `MULTIPLIES`.

    Raises:
        LookupError: An input is missing.
    """
    if kind == "scaled_dot_product_attention":
        query, key, value = (operands[part][0].shape for part in ("query", "key", "value"))
        return num_elements(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if kind == "matmul":
        return num_elements(result) * _factors(operands)[0][-1]
    return num_elements(result) * num_elements(operands["weight"][0].shape[1:])
