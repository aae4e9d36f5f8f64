"""Values written into the program itself, as numpy arrays, strings, and lists of labels."""

import math

import numpy as np

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.blob import unpack
from fastvlm_convert.mil.types import STRING, Message, TensorType, tensor_type

Stored = np.ndarray | str | list[str] | list[int]

_RANGED = ("ints", "longInts")


def decode_immediate(value: Message, where: str) -> Stored:
    """An immediate value.

    Args:
        value: The protobuf's `Value`, with its `immediateValue` set.
        where: What it belongs to, for messages.

    Returns:
        An array of the declared type and shape, a string, or a list of strings or whole numbers.

    Raises:
        BundleError: It has another number of elements than its type says, or no operation takes its kind.
    """
    immediate = value.immediateValue
    kind = immediate.WhichOneof("value")
    if kind == "list":
        return _decode_list([decode_immediate(v, where) for v in immediate.list.values], where)
    declared = tensor_type(value.type, where)
    if kind != "tensor" or declared is None or declared.fixed_shape is None:
        raise BundleError(f"{where} has a value that is no tensor of known shape")
    return _decode_tensor(immediate.tensor, declared, declared.fixed_shape, where)


def _decode_list(items: list[Stored], where: str) -> list[str] | list[int]:
    strings = [v for v in items if isinstance(v, str)]
    numbers = [int(v) for v in items if isinstance(v, np.ndarray) and v.size == 1 and v.dtype.kind in "iu"]
    if len(strings) == len(items):
        return strings
    if len(numbers) == len(items):
        return numbers
    raise BundleError(f"{where} is a list of other things than strings or whole numbers")


def _decode_tensor(tensor: Message, declared: TensorType, shape: tuple[int, ...], where: str) -> Stored:
    element = declared.element
    count = math.prod(shape)
    kind = tensor.WhichOneof("value")
    if kind is None:
        raise BundleError(f"{where} has no value")
    stored = getattr(tensor, kind).values
    if (element is STRING) != (kind == "strings"):
        raise BundleError(f"{where} is declared as {element.name}, but holds {kind}")
    if kind == "strings":
        strings = list(stored)
        if len(strings) != count:
            raise _miscounted(where, len(strings), declared)
        return strings[0] if not shape else strings
    if kind == "bytes":
        if len(stored) != (count * element.bits + 7) // 8:
            raise _miscounted(where, len(stored) * 8 // element.bits, declared)
        packed = np.frombuffer(stored, np.uint8)
        if element.bits < 8:
            return unpack(packed, element, count).reshape(shape)
        return packed.view(element.numpy).reshape(shape).copy()
    if len(stored) != count:
        raise _miscounted(where, len(stored), declared)
    wide = np.array(stored, np.int64 if kind in _RANGED else bool if kind == "bools" else np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # a number beyond the declared type is what it is
        return wide.astype(element.numpy).reshape(shape)


def _miscounted(where: str, found: int, declared: TensorType) -> BundleError:
    return BundleError(f"{where} holds {found} values, but is declared as {declared}")
