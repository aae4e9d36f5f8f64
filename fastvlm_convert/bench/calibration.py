"""A fixed piece of work: how fast is the machine itself, in this very round?"""

import time
from typing import Final

import numpy as np

_EDGE: Final = 512  # of the matrices: 1 MB each, which caches hold
_PRODUCTS: Final = 4
_FLOATS: Final = 8 << 20  # 32 MB, which they mostly do not
_SWEEPS: Final = 4


class Calibration:
    """Matrix products and sweeps through memory, as an answer is made of both."""

    executed_by = f"numpy {np.__version__}"

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._matrix = rng.standard_normal((_EDGE, _EDGE), np.float32)
        self._vector = rng.standard_normal(_FLOATS, np.float32)

    def run(self) -> float:
        """The time that the work took, in milliseconds."""
        start = time.perf_counter()
        for _ in range(_PRODUCTS):
            self._matrix @ self._matrix
        for _ in range(_SWEEPS):
            self._vector.max()
        return 1e3 * (time.perf_counter() - start)
