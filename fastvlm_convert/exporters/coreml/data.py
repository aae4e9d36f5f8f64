"""Files of weights: `weight.bin`, which coremltools writes, and what it is given.

After a header, each array of ten elements or more is a record of its facts and its elements, both begun on a
multiple of 64 bytes (`StorageFormat.hpp` of coremltools). Smaller arrays stand in the program itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from fastvlm_convert.arithmetic import ceil_div, num_elements

ALIGNMENT: Final = 64  # also the length of the header, and of each record

_SMALLEST = 10  # elements


def is_inline(shape: Sequence[int]) -> bool:
    """Whether an array is so small that it stands in the program."""
    return num_elements(shape) < _SMALLEST


class CountedData:
    """Lays arrays out like coremltools' writer and makes none of them."""

    def __init__(self) -> None:
        self.size = ALIGNMENT

    def append(self, length: int) -> int:
        """Put one array at the end.

        Args:
            length: Its bytes.

        Returns:
            Where its record lies, which is what a program refers to.
        """
        record = ceil_div(self.size, ALIGNMENT) * ALIGNMENT
        self.size = record + ALIGNMENT + length
        return record


class LazyArray(np.ndarray):
    """An array of the right shape and dtype that holds no data.

    coremltools' writer calls `flatten()` once for each: only then the weight is read. Anything else, a graph
    pass above all, sees zeros; so no passes run, and `proto` counts the reads.
    """

    _load: Callable[[], np.ndarray]
    num_reads: int

    def __new__(cls, shape: tuple[int, ...], dtype: Any, load: Callable[[], np.ndarray]) -> "LazyArray":  # noqa: ANN401
        """An array of a shape and dtype that `load` will return."""
        array = np.broadcast_to(np.zeros((), dtype), shape).view(cls)
        array._load = load
        array.num_reads = 0
        return array

    def __array_finalize__(self, parent: Any) -> None:  # noqa: ANN401
        self._load = getattr(parent, "_load", lambda: np.zeros(0))
        self.num_reads = 0

    def flatten(self, order: Any = "C") -> np.ndarray:  # noqa: ANN401
        """Read the weight; called by the writer."""
        self.num_reads += 1
        values = self._load()
        assert values.shape == self.shape
        return values.reshape(-1).view(_Flat)


class _Flat(np.ndarray):
    """Values on their way into the file. The writer asks for `tobytes()`, of which it only reads."""

    def tobytes(self, order: Any = "C") -> Any:  # noqa: ANN401
        """The memory itself: a copy would double the peak of the largest weight."""
        return self.view(np.ndarray).data
