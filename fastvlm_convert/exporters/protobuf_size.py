"""How long protobuf messages are: the wire format, counted.

A field is a tag and a varint, the four bytes of a float, or a length and so many bytes. A tag holds the
field's number and three more bits. https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterable
from functools import lru_cache

from fastvlm_convert.arithmetic import ceil_div

_BITS_A_BYTE = 7  # of a varint
_NEGATIVE = 10  # bytes of any negative varint: it is written as 64 bits
_FLOAT = 4


@lru_cache(1 << 12)
def varint(value: int) -> int:
    """Bytes of an integer."""
    return _NEGATIVE if value < 0 else max(1, ceil_div(value.bit_length(), _BITS_A_BYTE))


@lru_cache
def tag(field: int) -> int:
    """Bytes of the tag of a field's number."""
    return varint(field << 3)


def number(value: int, field: int = 1) -> int:
    """Bytes of an integer field."""
    return tag(field) + varint(value)


def real(field: int = 1) -> int:
    """Bytes of a float field."""
    return tag(field) + _FLOAT


def message(length: int, field: int = 1) -> int:
    """Bytes of a field that holds a message, or anything else, of `length` bytes."""
    return tag(field) + varint(length) + length


def text(value: str, field: int = 1) -> int:
    """Bytes of a text field."""
    return message(len(value.encode()), field)


def texts(values: Iterable[str], field: int = 1) -> int:
    """Bytes of text fields of one number, or of numbers with tags of one length."""
    return sum(text(value, field) for value in values)
