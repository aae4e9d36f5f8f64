"""Constants of a program: described when it is planned, decoded when an operation first needs them."""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.blob import WeightFile
from fastvlm_convert.mil.package import Package
from fastvlm_convert.mil.types import FLOAT16, Message, TensorType, shape_text, tensor_type
from fastvlm_convert.mil.values import Stored, decode_immediate

_WIDEN_ELEMENTS: Final = 1 << 22
_INT32: Final = np.iinfo(np.int32)


@dataclass(frozen=True)
class Blob:
    """Where the bytes of a constant lie.

    Attributes:
        file: The weight file.
        offset: Its record there.
        shape: Its dimensions.
    """

    file: WeightFile
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Constant:
    """A value that never changes.

    Attributes:
        key: Equal keys are equal values, also in different functions.
        what: What it is called, for messages.
        type: Its type as declared; None for a list of labels.
        load: Makes it anew as it is stored: an array, a string or a list.
        blob: Where it lies, if it is stored and not computed.
    """

    key: Hashable
    what: str
    type: TensorType | None
    load: Callable[[], Stored]
    blob: Blob | None = None

    @property
    def is_half(self) -> bool:
        """Whether it is declared as float16."""
        return self.type is not None and self.type.element is FLOAT16

    @property
    def decoded_bytes(self) -> int:
        """Memory it takes once it is decoded: four bytes an element."""
        shape = None if self.type is None else self.type.fixed_shape
        return 0 if shape is None else 4 * math.prod(shape)

    def array(self) -> np.ndarray:
        """The value as an array of numbers.

        Raises:
            BundleError: It is text or a list, or cannot be read.
        """
        value = self.load()
        if not isinstance(value, np.ndarray):
            raise BundleError(
                f"{self.what} is {'text' if isinstance(value, str) else 'a list'}, not a tensor"
            )
        return value


def constant_of(package: Package, value: Message, what: str) -> Constant:
    """The constant that a value of the protobuf describes.

    Args:
        package: Holds the weight files.
        value: The protobuf's `Value`.
        what: What it belongs to, for messages.

    Raises:
        BundleError: It has no value, an impossible type, or bytes outside its file.
    """
    kind = value.WhichOneof("value")
    if kind == "immediateValue":
        stored = decode_immediate(value, what)
        declared = tensor_type(value.type, what)
        key = ("immediate", declared and declared.element.name, _hashable(stored))
        return Constant(key, what, declared, lambda: stored)
    if kind != "blobFileValue":
        raise BundleError(f"{what} has no value", where=package.path)
    declared = tensor_type(value.type, what)
    shape = declared.fixed_shape if declared is not None else None
    if declared is None or shape is None or not declared.element.bits:
        raise BundleError(f"{what} is stored in a file, but is no tensor of known shape", where=package.path)
    file = package.weight_file(value.blobFileValue.fileName)
    offset, element = value.blobFileValue.offset, declared.element
    file.span(offset, element, shape, what)  # so that a damaged file is refused before anything runs
    return Constant(
        ("blob", str(file.path), offset, element.name, shape),
        what,
        declared,
        lambda: file.read(offset, element, shape, what),
        Blob(file, offset, shape),
    )


def computed(
    function: Callable[..., Any],
    arguments: Mapping[str, Constant],
    output: int,
    what: str,
    declared: TensorType | None,
) -> Constant:
    """The constant that a `constexpr` operation makes of others.

    Args:
        function: The operation, on arrays and strings as they are stored; one array, or a tuple of them.
        arguments: Its inputs by name.
        output: Which of its results.
        what: What it is called, for messages.
        declared: Its type as declared.
    """

    def load() -> np.ndarray:
        values = {name: argument.load() for name, argument in arguments.items()}
        try:
            made = function(**values)
            array = np.asarray(made[output] if isinstance(made, tuple) else made)
        except (ValueError, IndexError, OverflowError) as error:
            raise BundleError(f"{what} cannot be decoded: {error}") from error
        except (TypeError, AttributeError, MemoryError) as error:
            kinds = ", ".join(f"{name} is {_kind_text(value)}" for name, value in values.items())
            raise BundleError(f"{what} cannot be decoded: {kinds}") from error
        shape = None if declared is None else declared.fixed_shape
        if shape is not None and array.shape != shape:
            raise BundleError(f"{what} has shape {shape_text(array.shape)}, the program declares {declared}")
        return array

    inputs = tuple((name, argument.key) for name, argument in sorted(arguments.items()))
    return Constant((function.__name__, output, inputs), what, declared, load)


def _kind_text(value: Stored) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {shape_text(value.shape)}"
    return "text" if isinstance(value, str) else "a list"


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """An array as operations compute with it: float32, int32 or bool; shares memory where it can."""
    if array.dtype.kind == "f":
        wanted = array.astype(np.float32, copy=False)
    elif array.dtype == np.bool_:
        wanted = array
    else:
        inside = array if array.dtype.itemsize < 4 else np.clip(array, _INT32.min, _INT32.max)
        wanted = inside.astype(np.int32, copy=False)
    if not wanted.flags.writeable or not wanted.flags.c_contiguous:
        wanted = np.array(wanted, order="C")
    return torch.from_numpy(wanted)


class Weights:
    """Decoded constants, each kept once for all functions of a package.

    Args:
        rounded: Whether values declared as float16 are rounded to it when they were computed.
    """

    def __init__(self, rounded: bool) -> None:
        self._rounded = rounded
        self._tensors: dict[Hashable, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Memory of all decoded constants."""
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    def tensor(self, constant: Constant) -> torch.Tensor:
        """A constant as operations compute with it; floats are widened to float32.

        Raises:
            BundleError: It is text, or its inputs do not fit together.
        """
        if constant.key not in self._tensors:
            self._tensors[constant.key] = self._make(constant)
        return self._tensors[constant.key]

    def _make(self, constant: Constant) -> torch.Tensor:
        blob = constant.blob
        try:
            if blob is not None and constant.is_half:
                return _widened(blob, constant.array())
            tensor = to_tensor(constant.array())
            if self._rounded and blob is None and constant.is_half:
                tensor = tensor.half().float()
        except (MemoryError, RuntimeError) as error:  # torch's word for no memory is RuntimeError
            raise BundleError(f"there is not enough memory to decode {constant.what}") from error
        return tensor


def _widened(blob: Blob, stored: np.ndarray) -> torch.Tensor:
    """float16 to float32 piece by piece; the mapped bytes are given back, so that only one copy stays."""
    wide = torch.empty(blob.shape)
    flat, source = wide.view(-1), stored.reshape(-1)
    for first in range(0, source.size, _WIDEN_ELEMENTS):
        piece = source[first : first + _WIDEN_ELEMENTS]
        flat[first : first + piece.size].copy_(torch.from_numpy(piece))
    blob.file.forget(blob.offset, FLOAT16, blob.shape)
    return wide


def _hashable(stored: Stored) -> Hashable:
    if isinstance(stored, np.ndarray):
        return stored.shape, stored.tobytes()
    return tuple(stored) if isinstance(stored, list) else stored
