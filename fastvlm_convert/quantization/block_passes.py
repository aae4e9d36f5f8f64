"""Passes over the weights of blocks, compiled by Numba. Importing this module loads LLVM: import it late.

Blocks lie along the last axis, float32 [size, blocks]. The lanes of a vector are then blocks, and each block
is summed weight by weight, so that sums are the same to the bit on every processor, whatever the width of its
vectors.
"""

from typing import Final

import numpy as np

from fastvlm_convert.quantization.candidates import LARGEST_SCALE, SMALLEST_SCALE
from fastvlm_convert.quantization.compiled import compiled

_LANES: Final = 256  # blocks whose weights stay in a core's cache from one try to the next
_LINE: Final = 16  # floats of a cache line
_ZERO, _HALF, _ONE, _TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
_TINY: Final = np.finfo(np.float32).tiny

# float32 to float16, to the nearest and of two the even one.
_SMALLEST, _NORMAL, _LARGEST = np.float32(SMALLEST_SCALE), np.float32(2**-14), np.float32(LARGEST_SCALE)
_LOST: Final = np.int32(13)  # bits of the fraction
_BELOW_HALF, _KEPT = np.int32((1 << 12) - 1), np.int32(-1 << 13)


@compiled("void(float32[:, ::1], float32[:, ::1])")
def transpose(rows: np.ndarray, blocks: np.ndarray) -> None:
    """Copy blocks from [blocks, size] to [size, blocks]."""
    count, size = rows.shape
    for first in range(0, count, _LINE):
        last = min(first + _LINE, count)
        for i in range(size):
            source, target = rows[first:last, i], blocks[i, first:last]
            for lane in range(last - first):
                target[lane] = source[lane]


@compiled("void(float32[:, ::1], float32[::1])")
def sum_squares(blocks: np.ndarray, norm: np.ndarray) -> None:
    """Sum the squares of every block.

    Args:
        blocks: float32 [size, blocks].
        norm: Overwritten; float32 [blocks].
    """
    for lane in range(len(norm)):
        norm[lane] = _ZERO
    for i in range(len(blocks)):
        row = blocks[i]
        for lane in range(len(norm)):
            norm[lane] += row[lane] * row[lane]


@compiled(
    "void(float32[:, ::1], float32[::1], float32[:, ::1], float32[:, ::1], float32, float32[:, :, ::1])"
)
def sum_errors(
    blocks: np.ndarray,
    norm: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    greatest: float,
    sums: np.ndarray,
) -> None:
    """Round blocks with several parameters; with `w / s = p + r`, p whole, sum `p.p`, `r.r` and `p.r`.

    Args:
        blocks: float32 [size, blocks].
        norm: Their squares, summed; float32 [blocks].
        scale: float32 [tries, blocks].
        zero: Whole; like `scale`.
        greatest: Of the integers.
        sums: Overwritten; float32 [3, tries, blocks].
    """
    size, count = blocks.shape
    inverse, low, high = (
        np.empty(_LANES, np.float32),
        np.empty(_LANES, np.float32),
        np.empty(_LANES, np.float32),
    )
    for first in range(0, count, _LANES):
        last = min(first + _LANES, count)
        for number in range(len(scale)):
            scales, zeros = scale[number, first:last], zero[number, first:last]
            pp, rr, pr = sums[0, number, first:last], sums[1, number, first:last], sums[2, number, first:last]
            for lane in range(last - first):
                inverse[lane], low[lane] = _ONE / scales[lane], -zeros[lane]
                high[lane] = greatest - zeros[lane]
                pp[lane], rr[lane] = _ZERO, _ZERO
            for i in range(size):
                row = blocks[i, first:last]
                for lane in range(last - first):
                    exact = row[lane] * inverse[lane]
                    steps = min(max(np.rint(exact), low[lane]), high[lane])
                    left = exact - steps
                    pp[lane] += steps * steps
                    rr[lane] += left * left
            ww = norm[first:last]
            for lane in range(last - first):
                cross = (ww[lane] / scales[lane] / scales[lane] - pp[lane] - rr[lane]) * _HALF
                pr[lane] = _ZERO if pp[lane] == _ZERO else cross  # without steps all that is left is rounding


@compiled(
    "void(float32[:, ::1], float32[:, ::1], float32[:, ::1], float32[:, ::1], float32, float32[:, :, ::1])"
)
def sum_weighted_errors(
    blocks: np.ndarray,
    roots: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    greatest: float,
    sums: np.ndarray,
) -> None:
    """Like `sum_errors`, with p and r multiplied by roots.

    Args:
        blocks: float32 [size, blocks].
        roots: Like `blocks`.
        scale: float32 [tries, blocks].
        zero: Whole; like `scale`.
        greatest: Of the integers.
        sums: Overwritten; float32 [3, tries, blocks].
    """
    size, count = blocks.shape
    inverse, low, high = (
        np.empty(_LANES, np.float32),
        np.empty(_LANES, np.float32),
        np.empty(_LANES, np.float32),
    )
    for first in range(0, count, _LANES):
        last = min(first + _LANES, count)
        for number in range(len(scale)):
            scales, zeros = scale[number, first:last], zero[number, first:last]
            pp, rr, pr = sums[0, number, first:last], sums[1, number, first:last], sums[2, number, first:last]
            for lane in range(last - first):
                inverse[lane], low[lane] = _ONE / scales[lane], -zeros[lane]
                high[lane] = greatest - zeros[lane]
                pp[lane], rr[lane], pr[lane] = _ZERO, _ZERO, _ZERO
            for i in range(size):
                row, root = blocks[i, first:last], roots[i, first:last]
                for lane in range(last - first):
                    exact = row[lane] * inverse[lane]
                    steps = min(max(np.rint(exact), low[lane]), high[lane])
                    left = (exact - steps) * root[lane]
                    steps *= root[lane]
                    pp[lane] += steps * steps
                    rr[lane] += left * left
                    pr[lane] += steps * left


@compiled("void(float32[:, ::1], float32[:, ::1], float32[:, :, ::1], float32[:, ::1])")
def keep_best(scale: np.ndarray, zero: np.ndarray, sums: np.ndarray, best: np.ndarray) -> None:
    """Give each try the scale that suits its integers best, and keep it where it is better than the best.

    With `w / s = p + r`, p whole, `|r - d p|^2` is smallest at `d = p.r / p.p`. Expanding around the residual
    r instead of the weights keeps the difference of nearly equal sums out of float32.

    Args:
        scale: float32 [tries, blocks].
        zero: Whole; like `scale`.
        sums: `p.p`, `r.r` and `p.r` of the tries; float32 [3, tries, blocks].
        best: Scale, zero point, squared error and the inner product of the weights with p, of the best try so
            far; float32 [4, blocks]. Of equals the first stays.
    """
    for number in range(len(scale)):
        scales, zeros, kept, kept_zero = scale[number], zero[number], best[0], best[1]
        least, overlap = best[2], best[3]
        pp, rr, pr = sums[0, number], sums[1, number], sums[2, number]
        for lane in range(len(scales)):
            old = scales[lane]
            fit = old + old * (pr[lane] / max(pp[lane], _TINY))
            magnitude = min(max(abs(fit), _SMALLEST), _LARGEST)
            if magnitude < _NORMAL:
                magnitude = (magnitude + _HALF) - _HALF  # float16's subnormals are as far apart as these sums
            else:
                bits = np.float32(magnitude).view(np.int32)
                bits = np.int32((bits + _BELOW_HALF + ((bits >> _LOST) & 1)) & _KEPT)
                magnitude = bits.view(np.float32)
            fit = np.copysign(magnitude, fit)
            change = fit / old - _ONE
            error = (rr[lane] + change * (change * pp[lane] - _TWO * pr[lane])) * old * old
            if error < least[lane]:
                kept[lane], kept_zero[lane], least[lane] = fit, zeros[lane], error
                overlap[lane] = (pp[lane] + pr[lane]) * old


@compiled("void(float32[:, ::1], float32[::1], float32[::1], float32, uint8[:, ::1])")
def round_blocks(
    rows: np.ndarray, inverse: np.ndarray, zero: np.ndarray, greatest: float, q: np.ndarray
) -> None:
    """Round to the nearest integers.

    Args:
        rows: float32 [blocks, size].
        inverse: One by the scale, float32 [blocks].
        zero: Whole; float32 [blocks].
        greatest: Of the integers.
        q: Overwritten; uint8 like `rows`.
    """
    for block in range(len(rows)):
        row, rounded = rows[block], q[block]
        factor, least, most = inverse[block], -zero[block], greatest - zero[block]
        for i in range(len(row)):
            steps = min(max(np.rint(row[i] * factor), least), most)
            rounded[i] = np.uint8(np.int32(steps + zero[block]))
