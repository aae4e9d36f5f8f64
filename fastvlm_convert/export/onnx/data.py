"""Append-only files of external tensor data."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

ALIGNMENT = 4096  # ONNX Runtime maps a tensor into memory only when it starts on a page


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


class ExternalData:
    """Writes tensors one after another; nothing is kept in memory."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = path.open("xb")

    def append(self, chunks: Iterable[np.ndarray]) -> Region:
        """Write the chunks of one tensor, page-aligned."""
        offset = self._file.tell()
        self._file.write(bytes(-offset % ALIGNMENT))
        offset = self._file.tell()
        for chunk in chunks:
            self._file.write(np.ascontiguousarray(chunk).data)
        return Region(self._name, offset, self._file.tell() - offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
