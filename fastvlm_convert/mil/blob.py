"""Weight files: a header, then 64-byte records that each point at the bytes of one tensor; memory-mapped.

A record is `<IIQQ`: the sentinel 0xDEADBEEF, the type, the bytes and the offset of the data. Types below a
byte are packed without gaps, lowest bits first.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Final

import numpy as np

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.types import ElementType

_RECORD: Final = struct.Struct("<IIQQ")
_RECORD_BYTES: Final = 64
_SENTINEL: Final = 0xDEADBEEF
# Bits of each type number that a record may hold; bool is stored as uint8.
_RECORD_BITS: Final = {
    1: 16, 2: 32, 3: 8, 4: 8, 5: 16, 6: 16, 7: 16, 8: 4, 9: 1, 10: 2, 11: 4, 12: 3, 13: 6, 14: 32, 15: 32,
    16: 8, 17: 8,
}  # fmt: skip
_UNPACK_ELEMENTS: Final = 1 << 20  # a multiple of 8, so that each piece starts at a whole byte


class WeightFile:
    """One weight file of a package.

    Args:
        path: The file. It is mapped privately: nothing that is done to an array reaches the file.

    Raises:
        BundleError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError as error:  # mmap's word for an empty file
            raise BundleError("the weight file is empty", where=path) from error
        except OSError as error:
            raise BundleError(f"cannot read the weight file: {error.strerror}", where=path) from error

    def span(self, offset: int, element: ElementType, shape: tuple[int, ...], what: str) -> tuple[int, int]:
        """Where the data of a tensor lies, checked.

        Args:
            offset: Where its record lies.
            element: Type it is declared to have.
            shape: Shape it is declared to have.
            what: The tensor, for messages.

        Returns:
            Offset and number of bytes.

        Raises:
            BundleError: Record or data lie outside the file or disagree with the declaration.
        """
        size = len(self._map)
        if offset + _RECORD_BYTES > size:
            raise BundleError(
                f"the weights of {what} are declared at byte {offset}, but the file has {size} bytes",
                where=self.path,
                hint="the weight file is truncated or belongs to another package",
            )
        sentinel, kind, count, start = _RECORD.unpack_from(self._map, offset)
        if sentinel != _SENTINEL:
            raise BundleError(f"no weights of {what} lie at byte {offset}", where=self.path)
        if _RECORD_BITS.get(kind) != element.bits:
            raise BundleError(
                f"the weights of {what} are declared as {element.name}, but stored as type {kind}",
                where=self.path,
            )
        expected = (math.prod(shape) * element.bits + 7) // 8
        if count != expected:
            raise BundleError(
                f"the weights of {what} have {count} bytes, expected {expected} for "
                f"{element.name} {list(shape)}",
                where=self.path,
            )
        if start + count > size:
            raise BundleError(
                f"the weights of {what} end at byte {start + count}, but the file has {size} bytes",
                where=self.path,
                hint="the weight file is truncated; copy or export the package again",
            )
        return start, count

    def read(self, offset: int, element: ElementType, shape: tuple[int, ...], what: str) -> np.ndarray:
        """The values of a tensor as they are stored.

        Args:
            offset: Where its record lies.
            element: Type it is declared to have.
            shape: Shape it is declared to have.
            what: The tensor, for messages.

        Returns:
            An array of `element.numpy`: a view of the mapping, or a copy where elements are below a byte.

        Raises:
            BundleError: Record or data lie outside the file or disagree with the declaration.
        """
        start, count = self.span(offset, element, shape, what)
        if element.bits < 8:
            packed = np.frombuffer(self._map, np.uint8, count, start)
            return unpack(packed, element, math.prod(shape)).reshape(shape)
        values = np.frombuffer(self._map, element.numpy, math.prod(shape), start).reshape(shape)
        return values if start % element.numpy.itemsize == 0 else values.copy()

    def forget(self, offset: int, element: ElementType, shape: tuple[int, ...]) -> None:
        """Give back the memory that mirrors a tensor's bytes; they are read again if needed."""
        start, count = self.span(offset, element, shape, "a tensor")
        first = start - start % mmap.PAGESIZE
        if hasattr(self._map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, start + count - first)


def unpack(packed: np.ndarray, element: ElementType, count: int) -> np.ndarray:
    """Integers of less than a byte, one a byte.

    Args:
        packed: uint8 [(count * bits + 7) // 8], lowest bits first.
        element: Their type; below 8 bits.
        count: How many there are.

    Returns:
        int8 or uint8 [count].
    """
    bits = element.bits
    values = np.empty(count, np.uint8)
    for first in range(0, count, _UNPACK_ELEMENTS):
        piece = values[first : first + _UNPACK_ELEMENTS]
        source = packed[first * bits // 8 : ((first + len(piece)) * bits + 7) // 8]
        if bits == 4:
            piece[0::2] = source[: (len(piece) + 1) // 2] & 15
            piece[1::2] = source[: len(piece) // 2] >> 4
        else:
            digits = np.unpackbits(source, bitorder="little")[: len(piece) * bits].reshape(-1, bits)
            piece[:] = digits @ (1 << np.arange(bits, dtype=np.uint8))
    if not element.is_signed:
        return values
    signed = values.view(np.int8)
    signed -= (signed >= 1 << (bits - 1)).astype(np.int8) << bits
    return signed
