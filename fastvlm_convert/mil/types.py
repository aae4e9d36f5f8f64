"""Element types and shapes of values, as the file format declares them."""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.proto import mil

Message = Any  # a protobuf message; the generated classes have no types

MAX_AXES: Final = 16
# Far above any tensor on a phone; a file that claims more is damaged or hostile.
MAX_ELEMENTS: Final = 1 << 31


@dataclass(frozen=True)
class ElementType:
    """How one element is stored.

    Attributes:
        name: As in messages and reports: `float16`, `int4`.
        bits: Bits an element takes in a weight file.
        numpy: The numpy type of decoded elements; small integers are widened to a byte.
    """

    name: str
    bits: int
    numpy: np.dtype

    @property
    def is_float(self) -> bool:
        """Whether values are real numbers, which are computed in float32."""
        return self.numpy.kind == "f"

    @property
    def is_signed(self) -> bool:
        """Whether the sign takes one of the bits."""
        return self.numpy.kind in "fi"


def _element(name: str, bits: int, numpy: str) -> ElementType:
    return ElementType(name, bits, np.dtype(numpy))


STRING: Final = ElementType("string", 0, np.dtype(object))
BOOL: Final = _element("bool", 8, "?")
FLOAT16: Final = _element("float16", 16, "<f2")
FLOAT32: Final = _element("float32", 32, "<f4")
INT32: Final = _element("int32", 32, "<i4")

# The number in the protobuf -> the type. Its float8 and bfloat16 occur in no operation up to iOS 18.
ELEMENT_TYPES: Final = {
    mil.BOOL: BOOL,
    mil.STRING: STRING,
    mil.FLOAT16: FLOAT16,
    mil.FLOAT32: FLOAT32,
    mil.FLOAT64: _element("float64", 64, "<f8"),
    mil.INT8: _element("int8", 8, "<i1"),
    mil.INT16: _element("int16", 16, "<i2"),
    mil.INT32: INT32,
    mil.INT64: _element("int64", 64, "<i8"),
    mil.INT4: _element("int4", 4, "<i1"),
    mil.UINT8: _element("uint8", 8, "<u1"),
    mil.UINT16: _element("uint16", 16, "<u2"),
    mil.UINT32: _element("uint32", 32, "<u4"),
    mil.UINT64: _element("uint64", 64, "<u8"),
    mil.UINT6: _element("uint6", 6, "<u1"),
    mil.UINT4: _element("uint4", 4, "<u1"),
    mil.UINT3: _element("uint3", 3, "<u1"),
    mil.UINT2: _element("uint2", 2, "<u1"),
    mil.UINT1: _element("uint1", 1, "<u1"),
}
BY_NAME: Final = {element.name: element for element in ELEMENT_TYPES.values()}
# The names that `cast`, `quantize` and their kin take.
SHORT_NAMES: Final = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class TensorType:
    """Type of one tensor.

    Attributes:
        element: Type of its elements.
        shape: Its dimensions; None for one known only when it runs.
    """

    element: ElementType
    shape: Shape

    @property
    def fixed_shape(self) -> tuple[int, ...] | None:
        """The shape if all of it is known."""
        known = tuple(n for n in self.shape if n is not None)
        return known if len(known) == len(self.shape) else None

    def __str__(self) -> str:
        """For messages: `float16 [1, ?, 896]`."""
        return f"{self.element.name} {shape_text(self.shape)}"


def shape_text(shape: Shape) -> str:
    """A shape for people; `?` is a dimension known only when it runs."""
    return f"[{', '.join('?' if n is None else str(n) for n in shape)}]"


def element_type(number: int, where: str) -> ElementType:
    """The element type of a number in the protobuf.

    Raises:
        BundleError: There is no such type.
    """
    if number not in ELEMENT_TYPES:
        raise BundleError(f"{where} has the unknown element type {number}")
    return ELEMENT_TYPES[number]


def element_named(name: str, where: str) -> ElementType:
    """The element type of a name as operations spell it, `fp16` or `int8`.

    Raises:
        BundleError: There is no such type.
    """
    full = SHORT_NAMES.get(name, name)
    if full not in BY_NAME:
        raise BundleError(f"{where} names the unknown element type '{name[:40]}'")
    return BY_NAME[full]


def tensor_type(message: Message, where: str) -> TensorType | None:
    """The type of a tensor, or None if the value is no tensor.

    Args:
        message: The protobuf's `ValueType`.
        where: What the value is, for messages.

    Raises:
        BundleError: The element type is unknown or the shape absurd.
    """
    kind = message.WhichOneof("type")
    if kind == "stateType":
        return tensor_type(message.stateType.wrappedType, where)
    if kind != "tensorType":
        return None
    tensor = message.tensorType
    shape = tuple(
        d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions
    )
    check_shape(shape, where)
    return TensorType(element_type(tensor.dataType, where), shape)


def dictionary_types(message: Message, where: str) -> tuple[ElementType, TensorType] | None:
    """Types of the keys and values of a dictionary, or None if the value is none."""
    if message.WhichOneof("type") != "dictionaryType":
        return None
    keys = tensor_type(message.dictionaryType.keyType, where)
    values = tensor_type(message.dictionaryType.valueType, where)
    return None if keys is None or values is None else (keys.element, values)


def check_shape(shape: Shape, where: str) -> None:
    """Refuse what cannot be a tensor.

    Raises:
        BundleError: Too many axes or elements.
    """
    if len(shape) > MAX_AXES or math.prod(n for n in shape if n) > MAX_ELEMENTS:
        shown = shape_text(shape[:MAX_AXES])
        raise BundleError(f"{where} has the absurd shape {shown}", hint="the package is damaged")
