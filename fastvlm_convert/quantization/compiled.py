"""Functions compiled by Numba. Importing this module loads LLVM: import it late.

Every function has one signature. All of a module are compiled when it is first imported, in some seconds, and
Numba keeps the machine code beside the file or, where that folder is not writable, in the user's cache.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(signature: str) -> Callable[[_F], _F]:
    """Compile a function for one signature, to run without Python's lock.

    Results are the same to the bit on every processor as long as nothing is compiled with `fastmath`: LLVM
    contracts a product and a sum into one operation, or sums in another order, only where it is told that it
    may.
    """

    def decorate(function: _F) -> _F:
        made: Any = njit(nogil=True, error_model="numpy")(function)
        try:
            made.enable_caching()
            made.compile(signature)
        except (OSError, RuntimeError):  # no folder is writable, or the disk is full: kept nowhere
            made = njit(nogil=True, error_model="numpy")(function)
            made.compile(signature)
        made.disable_compile()
        return made

    return decorate
