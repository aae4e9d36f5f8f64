"""Append-only files of external tensor data."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

ALIGNMENT = 4096  # ONNX Runtime maps a tensor into memory only when it starts on a page

_WRONG_LENGTH = "a tensor is not as long as its shape says"


@dataclass(frozen=True)
class Region:
    """Where a tensor's bytes lie.

    Attributes:
        location: File name, relative to the graph.
        offset: First byte.
        length: Number of bytes.
    """

    location: str
    offset: int
    length: int


class DataFile(Protocol):
    """Where tensors go."""

    def inline(self, chunks: Iterable[np.ndarray], length: int) -> bytes:
        """A tensor so small that it stands in the graph instead; arguments as of `append`."""
        ...

    def append(self, chunks: Iterable[np.ndarray], length: int) -> Region:
        """Put one tensor at the end.

        Args:
            chunks: Its bytes, made while they are written.
            length: How many they are.
        """
        ...


class ExternalData:
    """Writes tensors one after another, each on a page of its own; nothing is kept in memory."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = path.open("xb")

    def inline(self, chunks: Iterable[np.ndarray], length: int) -> bytes:
        content = b"".join(np.ascontiguousarray(chunk).tobytes() for chunk in chunks)
        assert len(content) == length, _WRONG_LENGTH
        return content

    def append(self, chunks: Iterable[np.ndarray], length: int) -> Region:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        for chunk in chunks:
            self._file.write(np.ascontiguousarray(chunk).data)
        assert self._file.tell() == offset + length, _WRONG_LENGTH
        return Region(self._name, offset, length)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class CountedData:
    """Lays tensors out like `ExternalData` and makes none of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.size = 0

    def inline(self, chunks: Iterable[np.ndarray], length: int) -> bytes:
        return bytes(length)

    def append(self, chunks: Iterable[np.ndarray], length: int) -> Region:
        offset = self.size + -self.size % ALIGNMENT
        self.size = offset + length
        return Region(self._name, offset, length)
