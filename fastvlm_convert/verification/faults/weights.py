"""Faults in stored weights, each in one layer where it can be."""

import re
from collections.abc import Callable
from typing import Final

import numpy as np

from fastvlm_convert.io_names import Component
from fastvlm_convert.verification.faults.bundle_copy import Copy
from fastvlm_convert.verification.faults.constants import Constant, store_of
from fastvlm_convert.verification.faults.fault import NotApplicableError

Wanted = Callable[[Constant], bool]
Change = Callable[[np.ndarray, Constant], np.ndarray]

_FOUR_BITS: Final = 4
_HIGHEST: Final = 15  # of four bits
_LAYER: Final = re.compile(r"(l\d+|s\d+b\d+)_")
_LAYERED: Final[tuple[Component, ...]] = ("decoder", "vision")


def permute_scales(copy: Copy) -> None:
    """Give every row of one layer the scale of the row before it."""

    def change(scale: np.ndarray, constant: Constant) -> np.ndarray:
        return np.roll(scale, 1, axis=0)

    _edit_one(copy, "no layer has scales: none is stored as integers", _is_part("scale"), change)


def swap_nibbles(copy: Copy) -> None:
    """Read the two 4-bit integers of each byte of one layer in the other order."""

    def wanted(constant: Constant) -> bool:
        return constant.bits == _FOUR_BITS and constant.name.endswith(("_q", "_indices"))

    def change(packed: np.ndarray, constant: Constant) -> np.ndarray:
        return packed >> 4 | packed << 4

    _edit_one(copy, "no layer is stored in 4 bits", wanted, change)


def shift_zero_points(copy: Copy) -> None:
    """Add one to the zero points of one layer, where there is room."""

    def change(zero_points: np.ndarray, constant: Constant) -> np.ndarray:
        if constant.bits == _FOUR_BITS:
            low, high = (np.minimum(half + 1, _HIGHEST) for half in (zero_points & 15, zero_points >> 4))
            return low | high << 4
        highest = np.iinfo(zero_points.dtype).max
        return np.where(zero_points < highest, zero_points + 1, highest).astype(zero_points.dtype)

    absent = "no layer has zero points: the recipe's integers are symmetric, or there are none"
    _edit_one(copy, absent, _is_part("zero_point"), change)


def zero_bias(copy: Copy) -> None:
    """Set the bias of one convolution of the encoder to zero."""

    def change(bias: np.ndarray, constant: Constant) -> np.ndarray:
        return np.zeros_like(bias)

    _edit_one(copy, "no convolution has a bias", _is_part("ffn_conv_bias"), change)


def swap_channels(copy: Copy) -> None:
    """Let the first convolution read blue for red."""
    for constant in _constants(copy, "vision"):
        if constant.name in ("stem_0", "stem_0_q") and len(constant.shape) == 4 and constant.bits >= 8:
            store_of(copy).edit(copy, "vision", constant.name, lambda weight: weight[:, ::-1])
            return
    raise NotApplicableError("the first convolution's weights share bytes")


def mistie_head(copy: Copy) -> None:
    """Let the head read its table one row late; the embedding still reads the right one."""
    store_of(copy).edit_head(copy, lambda table: np.roll(table, 1, axis=0))


def _is_part(role: str) -> Wanted:
    return lambda constant: constant.name.endswith(f"_{role}")


def _constants(copy: Copy, component: Component) -> list[Constant]:
    return list(store_of(copy).constants(copy, component).values())


def _edit_one(copy: Copy, absent: str, wanted: Wanted, change: Change) -> None:
    """Change one constant of a layer: the middle one of those that are wanted, of the decoder if it has any.

    Raises:
        NotApplicableError: There is none, or what is stored would stay the same.
    """
    for component in _LAYERED:
        found = [c for c in _constants(copy, component) if wanted(c) and _LAYER.match(c.name)]
        middle = len(found) // 2
        for constant in found[middle:] + found[:middle]:
            if _edit(copy, component, constant, change):
                return
    raise NotApplicableError(absent)


def _edit(copy: Copy, component: Component, constant: Constant, change: Change) -> bool:
    """Change a constant; whether anything is different then."""
    is_changed = False

    def noticed(values: np.ndarray) -> np.ndarray:
        nonlocal is_changed
        changed = change(values, constant)
        is_changed = not np.array_equal(changed, values)
        return changed

    store_of(copy).edit(copy, component, constant.name, noticed)
    return is_changed
