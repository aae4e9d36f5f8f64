"""The one interface through which the reference, the exporters and the quantizer read weights.

A `WeightSource` maps canonical names to `Weight`s. Nothing is read until `Weight.read` is called, so that a
model larger than memory can be converted. Views (reparameterized, merged, folded) are plain functions
from one source to another.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastvlm_convert.arithmetic import num_elements

CHUNK_BYTES = 4 << 20  # float32 bytes read at a time: large enough to be fast, small beside any budget


@dataclass(frozen=True)
class Weight:
    """One named tensor, read on demand.

    Attributes:
        shape: Dimensions; `()` for a scalar.
        dtype: Name of the dtype it is stored in, for example `bfloat16`.
        read: Returns rows [start, stop) of the first axis as C-contiguous float32.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], np.ndarray]

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return num_elements(self.shape)

    def array(self) -> np.ndarray:
        """The whole tensor as float32 of `shape`."""
        return self.read(0, self.shape[0] if self.shape else 1).reshape(self.shape)

    def chunks(self) -> Iterator[np.ndarray]:
        """Consecutive blocks of rows, each at most about `CHUNK_BYTES`."""
        if not self.shape:
            yield self.array()
            return
        rows = max(1, CHUNK_BYTES * self.shape[0] // max(1, 4 * self.size))
        for start in range(0, self.shape[0], rows):
            yield self.read(start, min(start + rows, self.shape[0]))


WeightSource = Mapping[str, Weight]


def computed(shape: tuple[int, ...], dtype: str, compute: Callable[[], np.ndarray]) -> Weight:
    """A weight that is computed whole when it is read; for tensors that are small.

    Args:
        shape: Shape of what `compute` returns.
        dtype: Stored dtype of the tensors it is computed from.
        compute: Returns the tensor; it is converted to float32.
    """

    def read(start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(compute()[start:stop], np.float32)

    return Weight(shape, dtype, read)


def same_content(a: Weight, b: Weight) -> bool:
    """Whether two weights hold the same numbers; reads only up to the first difference."""
    return a.shape == b.shape and all(
        np.array_equal(x, y) for x, y in zip(a.chunks(), b.chunks(), strict=True)
    )


def reshaped(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """The same rows seen with other trailing dimensions; the first axis must keep its length."""

    def read(start: int, stop: int) -> np.ndarray:
        return weight.read(start, stop).reshape((stop - start, *shape[1:]))

    return Weight(shape, weight.dtype, read)


def transposed(weight: Weight) -> Weight:
    """A small matrix the other way round; it is read whole whatever rows are asked for."""

    def read(start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(weight.array()[:, start:stop].T)

    return Weight(weight.shape[::-1], weight.dtype, read)
