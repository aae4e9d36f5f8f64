"""The table of operations: a name -> a function, whose annotations say what each input is.

    @op("transpose", moves=True)
    def transpose(x: Tensor, perm: Ints) -> Tensor:
        return x.permute(perm)

Inputs have the names that the program gives them. A `Tensor` is handed over as it is; `Ints`, `int`, `float`,
`bool`, `str` and their kin are plain Python values, read from constants once or from tensors in each run;
`Labels` are a constant list, `Dimensions` sizes of which None is known only when it runs. A parameter with a
default is optional. Values of float16 are held as float32, all integers as int32.

Some parameters are not inputs: `Rounding` rounds an intermediate result to float16, and is None where
arithmetic is in float32; `Limit` refuses results that are larger than the program declares; `Target` is the
declared element type; `InPlace` says that the first input is not needed any more.
"""

import inspect
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, TypeVar

import numpy as np
import torch

from fastvlm_convert.mil.types import ElementType, shape_text

Tensor = torch.Tensor
Tensors = list[torch.Tensor]
Ints = tuple[int, ...]
Floats = tuple[float, ...]
Bools = tuple[bool, ...]
Strings = tuple[str, ...]
Labels = tuple[str, ...] | tuple[int, ...]
Dimensions = tuple[int | None, ...]
Scalar = int | float | bool
Target = ElementType
Rounding = Callable[[torch.Tensor], torch.Tensor] | None


class InPlace(Enum):
    """Whether an operation may overwrite its first input."""

    NO = False
    YES = True


class List(list):
    """A list of tensors, the value of the `list_*` operations; None where nothing was written yet."""


@dataclass(frozen=True)
class Limit:
    """How many elements a result may have.

    Attributes:
        elements: The most.
    """

    elements: int

    def check(self, shape: Sequence[int]) -> Sequence[int]:
        """The shape itself.

        Raises:
            ValueError: A size is negative, or a tensor of that shape has too many elements.
        """
        if any(n < 0 for n in shape) or math.prod(shape) > self.elements:
            raise ValueError(
                f"a result of shape {shape_text(tuple(shape))} exceeds what the program declares"
            )
        return shape


class Kind(Enum):
    """What a parameter of an operation's function takes."""

    TENSOR = Tensor
    TENSORS = Tensors
    LIST = List
    INTS = Ints
    FLOATS = Floats
    BOOLS = Bools
    STRINGS = Strings
    INT = int
    FLOAT = float
    BOOL = bool
    STR = str
    LABELS = Labels
    DIMENSIONS = Dimensions
    SCALAR = Scalar
    ROUNDING = Rounding
    LIMIT = Limit
    TARGET = Target
    IN_PLACE = InPlace


_HELD_DTYPES: Final = {"f": torch.float32, "b": torch.bool}
GIVEN_BY_PLAN: Final = frozenset({Kind.ROUNDING, Kind.LIMIT, Kind.TARGET, Kind.IN_PLACE})
_KINDS: Final = {repr(kind.value): kind for kind in Kind}


@dataclass(frozen=True)
class Parameter:
    """An input of an operation.

    Attributes:
        name: What the program calls it.
        kind: What it takes.
        required: Whether the program must give it.
    """

    name: str
    kind: Kind
    required: bool


@dataclass(frozen=True)
class Op:
    """An operation.

    Attributes:
        name: As the program spells it.
        function: Computes it.
        parameters: What its function takes, by name.
        moves: Whether it only moves values: results need no rounding, and may share memory with its inputs.
        plain: Whether it gives Python values instead of tensors.
    """

    name: str
    function: Callable[..., Any]
    parameters: dict[str, Parameter]
    moves: bool
    plain: bool = False

    @property
    def inputs(self) -> dict[str, Parameter]:
        """The parameters that a program may give."""
        return {name: p for name, p in self.parameters.items() if p.kind not in GIVEN_BY_PLAN}


OPS: Final[dict[str, Op]] = {}
CONSTEXPRS: Final[dict[str, Callable[..., Any]]] = {}
# Operations of coremltools that cannot be run, and why.
UNSUPPORTED: Final = {
    "_const_symbolic": "a helper of coremltools' own tests, which is never written to a package",
    "conv_quantized": "experimental, with the layout of its scales unspecified; converters write a `conv` "
    "of a `constexpr_*` weight instead",
}

_F = TypeVar("_F", bound=Callable[..., Any])


def op(name: str, *, moves: bool = False, plain: bool = False) -> Callable[[_F], _F]:
    """Enter a function into the table.

    Args:
        name: The operation it computes.
        moves: See `Op.moves`.
        plain: See `Op.plain`.
    """

    def enter(function: _F) -> _F:
        assert name not in OPS, name
        OPS[name] = Op(name, function, _parameters(function), moves, plain)
        return function

    return enter


def constexpr(name: str) -> Callable[[_F], _F]:
    """Enter a function that decodes a constant: it takes arrays as they are stored and returns arrays."""

    def enter(function: _F) -> _F:
        CONSTEXPRS[name] = function
        return function

    return enter


def _parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    hints = typing.get_type_hints(function)
    return {
        p.name: Parameter(p.name, _kind(hints[p.name]), p.default is inspect.Parameter.empty)
        for p in inspect.signature(function).parameters.values()
    }


def _kind(hint: Any) -> Kind:  # noqa: ANN401
    if repr(hint) in _KINDS:
        return _KINDS[repr(hint)]
    plain = [a for a in typing.get_args(hint) if a is not type(None)]  # an optional input: `Tensor | None`
    assert len(plain) == 1, hint
    return _KINDS[repr(plain[0])]


def in_half(rounded: Rounding, x: Tensor) -> Tensor:
    """An intermediate result, rounded to float16 where arithmetic is in float16."""
    return x if rounded is None else rounded(x)


def held_dtype(element: ElementType) -> torch.dtype:
    """What values of a declared type are held as: float32, int32 or bool."""
    return _HELD_DTYPES.get(element.numpy.kind, torch.int32)


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape that tensors of these shapes have together.

    Raises:
        ValueError: They do not fit.
    """
    return np.broadcast_shapes(*(tuple(s) for s in shapes))


def axis_of(axis: int, rank: int) -> int:
    """A non-negative axis.

    Raises:
        IndexError: There is no such axis.
    """
    if not -rank <= axis < rank:
        raise IndexError(f"axis {axis} is outside the {rank} axes of the tensor")
    return axis % rank


def axes_of(axes: Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Non-negative axes in ascending order; all of them for None.

    Raises:
        IndexError: There is no such axis.
        ValueError: An axis is named twice.
    """
    found = range(rank) if axes is None else sorted(axis_of(a, rank) for a in axes)
    if len(set(found)) != len(found):
        raise ValueError(f"the axes {tuple(found)} name one twice")
    return tuple(found)


def positive(values: Sequence[int], what: str) -> tuple[int, ...]:
    """The values themselves.

    Raises:
        ValueError: One is not above 0.
    """
    if any(v < 1 for v in values):
        raise ValueError(f"{what} {tuple(values)} must be positive")
    return tuple(values)
