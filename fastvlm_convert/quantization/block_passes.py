"""Passes over the weights of blocks, compiled by Numba. Importing this module loads LLVM: import it late.

Blocks lie along the last axis, float32 [size, blocks]. The lanes of a vector are then blocks, and each block
is summed weight by weight, so that sums are the same to the bit on every processor, whatever the width of its
vectors.
"""

from typing import Final

import numpy as np

from fastvlm_convert.quantization.compiled import compiled

_TOGETHER: Final = 256  # blocks whose weights stay in a core's cache from one try to the next
_LINE: Final = 16  # floats of a cache line
_ZERO: Final = np.float32(0)


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


@compiled("void(float32[:, ::1], float32[:, ::1], float32[:, ::1], float32[:, ::1], float32[:, :, ::1])")
def sum_errors(
    blocks: np.ndarray, inverse: np.ndarray, low: np.ndarray, high: np.ndarray, sums: np.ndarray
) -> None:
    """Round blocks with several parameters; with `w / s = p + r`, p whole, sum `p.p` and `r.r`.

    Args:
        blocks: float32 [size, blocks].
        inverse: One by the scale, float32 [tries, blocks].
        low: Least p, whole; like `inverse`.
        high: Greatest p, whole; like `inverse`.
        sums: The first two are overwritten with both; float32 [2 or more, tries, blocks].
    """
    size, count = blocks.shape
    for first in range(0, count, _TOGETHER):
        last = min(first + _TOGETHER, count)
        for number in range(len(inverse)):
            factor, least, most = (
                inverse[number, first:last],
                low[number, first:last],
                high[number, first:last],
            )
            pp, rr = sums[0, number, first:last], sums[1, number, first:last]
            for lane in range(last - first):
                pp[lane], rr[lane] = _ZERO, _ZERO
            for i in range(size):
                row = blocks[i, first:last]
                for lane in range(last - first):
                    exact = row[lane] * factor[lane]
                    steps = min(max(np.rint(exact), least[lane]), most[lane])
                    left = exact - steps
                    pp[lane] += steps * steps
                    rr[lane] += left * left


@compiled(
    "void(float32[:, ::1], float32[:, ::1], float32[:, ::1], float32[:, ::1], float32[:, ::1], "
    "float32[:, :, ::1])"
)
def sum_weighted_errors(
    blocks: np.ndarray,
    roots: np.ndarray,
    inverse: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    sums: np.ndarray,
) -> None:
    """Like `sum_errors`, with p and r multiplied by roots; sums `p.r`, too.

    Args:
        blocks: float32 [size, blocks].
        roots: Like `blocks`.
        inverse: One by the scale, float32 [tries, blocks].
        low: Least p, whole; like `inverse`.
        high: Greatest p, whole; like `inverse`.
        sums: Overwritten with `p.p`, `r.r` and `p.r`; float32 [3, tries, blocks].
    """
    size, count = blocks.shape
    for first in range(0, count, _TOGETHER):
        last = min(first + _TOGETHER, count)
        for number in range(len(inverse)):
            factor, least, most = (
                inverse[number, first:last],
                low[number, first:last],
                high[number, first:last],
            )
            pp, rr, pr = sums[0, number, first:last], sums[1, number, first:last], sums[2, number, first:last]
            for lane in range(last - first):
                pp[lane], rr[lane], pr[lane] = _ZERO, _ZERO, _ZERO
            for i in range(size):
                row, root = blocks[i, first:last], roots[i, first:last]
                for lane in range(last - first):
                    exact = row[lane] * factor[lane]
                    steps = min(max(np.rint(exact), least[lane]), most[lane])
                    left = (exact - steps) * root[lane]
                    steps *= root[lane]
                    pp[lane] += steps * steps
                    rr[lane] += left * left
                    pr[lane] += steps * left


@compiled("void(float32[:, ::1], float32[::1], float32[::1], float32, uint8[:, ::1])")
def round_blocks(rows: np.ndarray, inverse: np.ndarray, zero: np.ndarray, last: float, q: np.ndarray) -> None:
    """Round to the nearest integers.

    Args:
        rows: float32 [blocks, size].
        inverse: One by the scale, float32 [blocks].
        zero: Whole; float32 [blocks].
        last: The greatest integer.
        q: Overwritten; uint8 like `rows`.
    """
    for block in range(len(rows)):
        row, rounded = rows[block], q[block]
        factor, least, most = inverse[block], -zero[block], last - zero[block]
        for i in range(len(row)):
            steps = min(max(np.rint(row[i] * factor), least), most)
            rounded[i] = np.uint8(np.int32(steps + zero[block]))
