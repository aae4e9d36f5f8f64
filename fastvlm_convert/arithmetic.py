"""Integer arithmetic of shapes and sizes."""

import math
from collections.abc import Sequence


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient rounded up, exact for integers of any size."""
    return -(-dividend // divisor)


def num_elements(shape: Sequence[int]) -> int:
    """Number of elements of an array; 1 for a scalar, whose shape is `()`."""
    return math.prod(shape)
