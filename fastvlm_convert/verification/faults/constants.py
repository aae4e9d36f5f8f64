"""Stored constants of a bundle's graphs and programs, under the same names for every target.

`l0_down_q`, `l0_down_scale` and `l0_down_zero_point` are the integers of an operation, `l0_down_indices` and
`l0_down_lut` those of a palette, `stem_0_weight` and `stem_0_bias` are floats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Final, Protocol

import numpy as np

from fastvlm_convert.io_names import Component
from fastvlm_convert.verification.faults.bundle_copy import Copy
from fastvlm_convert.verification.faults.fault import NotApplicableError

Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Constant:
    """A constant of a graph.

    Attributes:
        name: Name that all targets share.
        bits: Bits of an element.
        shape: Its shape as the file declares it.
    """

    name: str
    bits: int
    shape: tuple[int, ...]


class Store(Protocol):
    """Module that reads and edits the stored constants of a target."""

    def constants(self, copy: Copy, component: Component) -> Mapping[str, Constant]:
        """The constants of one component of a copy, by name, in the order of the file."""
        ...

    def edit(self, copy: Copy, component: Component, name: str, change: Change) -> None:
        """Replace the stored bytes of a constant, wherever they are used.

        `change` gets the elements, or, where those are smaller than a byte, bytes of several [rows, bytes];
        it returns as many.
        """
        ...

    def edit_head(self, copy: Copy, change: Change) -> None:
        """Make the head read other integers or floats, [rows, anything]; the embedding keeps its own."""
        ...


_STORES: Final = {
    "onnx": "fastvlm_convert.verification.faults.onnx_store",
    "coreml": "fastvlm_convert.verification.faults.coreml_store",
}


def store_of(copy: Copy) -> Store:
    """What edits the constants of a copy's target.

    Raises:
        NotApplicableError: Faults cannot be planted in the files of that target.
    """
    if copy.target not in _STORES:
        raise NotApplicableError(f"faults are not planted in {copy.target} files")
    store: Store = import_module(_STORES[copy.target])
    return store


def rows_of(content: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Packed bytes by row of the first axis, where rows end with whole bytes; else all in one row."""
    rows = shape[0] if shape and len(content) % shape[0] == 0 else 1
    return content.reshape(rows, -1)
