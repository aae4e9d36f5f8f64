"""Scales and zero points worth trying for a block of weights, from the block's range alone."""

from collections.abc import Iterator

import numpy as np

from fastvlm_convert.quantized.schemes import AffineScheme
from fastvlm_convert.weights.storage import FLOAT16_MAX

SMALLEST_SCALE = 2.0**-24  # float16's smallest subnormal: a scale is never zero
LARGEST_SCALE = FLOAT16_MAX

# Ranges tried, as a block's own range divided by a factor. The more weights share a scale, the more it pays
# to clip the outliers; with 256 levels it hardly pays at all.
WIDEST = {4: 0.85, 8: 0.99}
NARROWEST = {16: 1.30, 32: 1.40, 64: 1.55, 128: 1.70}
NARROWEST_ROW = 2.5
NARROWEST_8_BIT = 1.06

Parameters = tuple[np.ndarray, np.ndarray]
"""Scales (representable in float16) and whole zero points of blocks; both float32, one a block."""


def storable(scale: np.ndarray) -> np.ndarray:
    """Scales as they will be stored, in float32: float16 numbers, never zero and never infinite."""
    magnitude = np.clip(np.abs(scale), np.float32(SMALLEST_SCALE), np.float32(LARGEST_SCALE))
    return np.copysign(magnitude, scale).astype(np.float16).astype(np.float32)


def widest_and_narrowest(scheme: AffineScheme, size: int) -> tuple[float, float]:
    """The smallest and the largest factor by which the range of a block of this size is divided."""
    narrowest = NARROWEST.get(size, NARROWEST_ROW) if scheme.bits == 4 else NARROWEST_8_BIT
    return WIDEST[scheme.bits], narrowest


def plain_parameters(low: np.ndarray, high: np.ndarray, scheme: AffineScheme) -> Parameters:
    """Parameters of plain rounding: a block's own range; where symmetric, its largest magnitude is `-middle`.

    Args:
        low: Least weight of every block, float32.
        high: Greatest weight.
        scheme: Bits and symmetry.
    """
    scale = storable(full_scale(low, high, scheme))
    if scheme.symmetric:
        return scale, np.full(low.shape, scheme.middle, np.float32)
    return scale, np.clip(np.rint(-np.minimum(low, 0) / scale), 0, np.float32(scheme.levels - 1))


def full_scale(low: np.ndarray, high: np.ndarray, scheme: AffineScheme) -> np.ndarray:
    """The scale that covers a block's range, zero included; where symmetric, with plain rounding's sign."""
    if scheme.symmetric:
        full = np.maximum(-low, high) / scheme.middle
        return np.where(-low > high, full, -full)
    return (np.maximum(high, 0) - np.minimum(low, 0)) / np.float32(scheme.levels - 1)


def centered_zero(low: np.ndarray, high: np.ndarray, scale: np.ndarray, scheme: AffineScheme) -> np.ndarray:
    """The zero point, not whole, that centers an asymmetric range on the block's; zero included."""
    middle = (np.minimum(low, 0) + np.maximum(high, 0)) / 2
    return np.float32(scheme.levels - 1) / 2 - middle / scale


def candidates(blocks: np.ndarray, scheme: AffineScheme, steps: int) -> Iterator[Parameters]:
    """Plain rounding, then two candidates for each of `steps` ranges: both signs or both zero points.

    Args:
        blocks: float32 [rows, blocks, size].
        scheme: Bits and symmetry.
        steps: Ranges tried.
    """
    low, high = blocks.min(-1), blocks.max(-1)
    scale, zero = plain_parameters(low, high, scheme)
    yield scale, zero
    full = full_scale(low, high, scheme)
    for factor in np.geomspace(*widest_and_narrowest(scheme, blocks.shape[-1]), steps, dtype=np.float32):
        scale = storable(full / factor)
        if scheme.symmetric:
            # The sign decides which end of the block gets the extra level.
            yield np.abs(scale), zero
            yield -np.abs(scale), zero
        else:
            below = np.floor(centered_zero(low, high, scale, scheme))
            for whole in (below, below + 1):
                yield scale, np.clip(whole, 0, np.float32(scheme.levels - 1))
