"""Affine quantization without data: the best scale and zero point of every block.

What is minimized is `sum_i h_i (w_i - (q_i - z) s)^2` over a block, where s is a float16 number and h the
importance of an input column (the mean square of its input where there is calibration, else one). A coarse
grid of ranges comes first, then the neighbors of its best; errors stay within 1 % of what a fine grid leaves.
Each candidate's integers get the scale that least squares gives them, as in llama.cpp's `make_qx_quants` and
NNCF's scale estimation, rounded to float16 before it is judged. Plain rounding is among the candidates, so
that the result is never worse than it.

Least squares shrinks weights: its error points against them, and since trained weights are aligned with their
inputs, all outputs shrink together. The last step therefore takes the scale whose error is orthogonal to the
weights: that adds hardly any squared error, and the measured KL divergence falls.

The time goes into passes over the weights, one a try, which are compiled (`block_passes`). What is a number a
block is computed by NumPy. Threads search tiles of some rows, in which blocks lie along the last axis.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from fastvlm_convert.arithmetic import ceil_div
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.processors import num_threads
from fastvlm_convert.quantization.candidates import (
    Parameters,
    centered_zero,
    full_scale,
    plain_parameters,
    storable,
    widest_and_narrowest,
)
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme

TILE = 1 << 17  # weights that a thread searches at a time
MOST_THREADS = 4  # each holds a tile, or three with importance

STEPS = {4: 6, 8: 4}  # ranges tried at least, evenly spaced by their logarithms
WIDEST_STEP = 1.13  # from one range to the next; whole rows have a wider grid
STEPS_WEIGHTED = {4: 20, 8: 12}  # with importance, when a few columns make the error jump with the range
NEIGHBORS = {4: (-1 / 3, 1 / 3), 8: (-1 / 2, -1 / 4, 1 / 4, 1 / 2)}  # tried next, in steps of that grid


def quantize_affine(
    weight: np.ndarray, scheme: AffineScheme, importance: np.ndarray | None = None
) -> AffineMatrix:
    """Search scales and zero points, and round.

    Args:
        weight: float32 [rows, columns].
        scheme: Its block size must divide the columns.
        importance: Weight of every column's error, float32 [columns], not negative; None for equal weights.
    """
    size = block_size_of(weight.shape, scheme)
    roots = None if importance is None else roots_of(importance).reshape(-1, size)
    return _by_tiles(weight, scheme, lambda rows: _search(_Problem.of(rows, scheme, roots)))


def round_to_nearest(weight: np.ndarray, scheme: AffineScheme) -> AffineMatrix:
    """Plain rounding to a block's own range; where symmetric, its largest magnitude gets `-2^(bits-1)`.

    Args:
        weight: float32 [rows, columns].
        scheme: Its block size must divide the columns.
    """
    block_size_of(weight.shape, scheme)
    return _by_tiles(weight, scheme, lambda rows: plain_parameters(rows.min(1), rows.max(1), scheme))


def block_size_of(shape: tuple[int, ...], scheme: AffineScheme) -> int:
    """Columns of a block of a matrix of this shape; an error where the scheme's size does not divide them."""
    rows, columns = shape
    size = scheme.block_size or columns
    if columns % size:
        raise RecipeError(
            f"blocks of {size} do not divide the {columns} columns of a matrix of {rows} rows",
            hint="choose a block size that divides the columns, or quantize per channel",
        )
    return size


def roots_of(importance: np.ndarray) -> np.ndarray:
    """Root of the importance, scaled so that sums of squares stay in float32; all ones where all is zero."""
    largest = importance.max()
    if largest == 0:
        return np.ones(importance.shape, np.float32)
    return np.sqrt(importance / largest).astype(np.float32)


@dataclass(frozen=True)
class _Problem:
    """Blocks whose parameters are wanted.

    Attributes:
        blocks: float32 [size, blocks].
        roots: Root of the importance, float32 like `blocks`, or None.
        scheme: Bits and symmetry.
        low: Least weight of every block, float32 [blocks].
        high: Greatest weight.
        norm: Squares of the weights times the importance, summed; float32 [blocks].
    """

    blocks: np.ndarray
    roots: np.ndarray | None
    scheme: AffineScheme
    low: np.ndarray
    high: np.ndarray
    norm: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, scheme: AffineScheme, roots: np.ndarray | None) -> "_Problem":
        """Blocks of some rows of a matrix.

        Args:
            rows: The blocks one below the other, float32 [blocks, size].
            scheme: Bits and symmetry.
            roots: Root of the importance of a row's columns, float32 [blocks of a row, size], or None.
        """
        blocks, weights = _transposed(rows), None
        if roots is not None:
            weights = _transposed(np.tile(roots, (len(rows) // len(roots), 1)))
        norm = np.empty(len(rows), np.float32)
        _passes().sum_squares(blocks if weights is None else blocks * weights, norm)
        return cls(blocks, weights, scheme, blocks.min(0), blocks.max(0), norm)

    def centered(self, scale: np.ndarray) -> np.ndarray:
        """Zero points that center the range of some scales [..., blocks] on the block's; like `scale`."""
        if self.scheme.symmetric:
            return np.full(scale.shape, self.scheme.middle, np.float32)
        center = centered_zero(self.low, self.high, scale, self.scheme)
        return np.clip(np.rint(center), 0, np.float32(self.scheme.levels - 1))


def _search(problem: _Problem) -> Parameters:
    """The best scale and zero point of every block, both float32 [blocks]."""
    scheme = problem.scheme
    plain = plain_parameters(problem.low, problem.high, scheme)
    best = _as_they_are(problem, *plain)
    plain_error = best[2].copy()

    widest, narrowest = widest_and_narrowest(scheme, len(problem.blocks))
    steps = (STEPS if problem.roots is None else STEPS_WEIGHTED)[scheme.bits]
    steps = max(steps, math.ceil(math.log(narrowest / widest, WIDEST_STEP)))
    step = (narrowest / widest) ** (1 / steps)
    factors = (widest * step ** (np.arange(steps) + 0.5)).astype(np.float32)
    scales = storable(full_scale(problem.low, problem.high, scheme) / factors[:, None])
    grid = scales, problem.centered(scales)
    _try(problem, best, *grid)
    if problem.roots is not None:
        _try(problem, best, *_other_side(problem, *grid))

    moves = (step ** np.array(NEIGHBORS[scheme.bits])).astype(np.float32)
    scales = storable(best[0] * moves[:, None])
    other_scale, other_zero = _other_side(problem, best[:1], best[1:2])
    zeros = np.concatenate([problem.centered(scales), other_zero])
    _try(problem, best, np.concatenate([scales, other_scale]), zeros)
    _try(problem, best, best[:1].copy(), best[1:2].copy())
    return _unshrunk(problem, best, plain_error), best[1]


def _as_they_are(problem: _Problem, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Parameters [blocks] that are not fitted to their integers, in the form of a best try."""
    norm, error, cross = _sums(problem, scale[None], zero[None])[:, 0]
    return np.stack([scale, zero, error * scale * scale, (norm + cross) * scale])


def _try(problem: _Problem, best: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> None:
    """Try parameters [tries, blocks], and keep what is better than the best."""
    _passes().keep_best(scale, zero, _sums(problem, scale, zero), best)


def _sums(problem: _Problem, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """`p.p`, `r.r` and `p.r` of tries, where `w / s = p + r` and p is whole; float32 [3, tries, blocks]."""
    sums = np.empty((3, *scale.shape), np.float32)
    greatest = np.float32(problem.scheme.levels - 1)
    if problem.roots is None:
        _passes().sum_errors(problem.blocks, problem.norm, scale, zero, greatest, sums)
    else:
        _passes().sum_weighted_errors(problem.blocks, problem.roots, scale, zero, greatest, sums)
    return sums


def _other_side(problem: _Problem, scale: np.ndarray, zero: np.ndarray) -> Parameters:
    """The next best way to lay a range: the extra level at the other end, or where asymmetric another zero.

    Args:
        problem: The blocks.
        scale: float32 [tries, blocks].
        zero: Near those that center the range; like `scale`.
    """
    if problem.scheme.symmetric:
        return -scale, zero
    center = centered_zero(problem.low, problem.high, scale, problem.scheme)
    other = zero + np.where(center < zero, np.float32(-1), np.float32(1))
    return scale, np.clip(other, 0, np.float32(problem.scheme.levels - 1))


def _unshrunk(problem: _Problem, best: np.ndarray, plain_error: np.ndarray) -> np.ndarray:
    """Scales [blocks] with an error orthogonal to the weights, unless plain rounding would be better."""
    scale, zero, _, overlap = best
    usable = np.abs(overlap) > np.finfo(np.float32).tiny
    wider = storable(np.where(usable, problem.norm / np.where(usable, overlap, 1), scale))
    _, error, _ = _sums(problem, wider[None], zero[None])[:, 0]
    return np.where(error * wider * wider <= plain_error, wider, scale)


def _by_tiles(
    weight: np.ndarray, scheme: AffineScheme, parameters_of: Callable[[np.ndarray], Parameters]
) -> AffineMatrix:
    """Parameters and integers of a matrix, some rows at a time in each of some threads.

    Args:
        weight: float32 [rows, columns].
        scheme: How.
        parameters_of: Of blocks, float32 [blocks, size].
    """
    rows, columns = weight.shape
    blocks = scheme.num_blocks(columns)
    matrix = AffineMatrix(
        scheme,
        np.empty((rows, columns), np.uint8),
        np.empty((rows, blocks), np.float16),
        np.empty((rows, blocks), np.uint8),
    )
    step = min(max(1, TILE // columns), rows)
    threads = min(MOST_THREADS, num_threads(), ceil_div(rows, step))

    def solve(thread: int) -> None:
        for start in range(thread * step, rows, threads * step):
            part = slice(start, start + step)
            values = np.ascontiguousarray(weight[part], np.float32).reshape(-1, columns // blocks)
            scale, zero = parameters_of(values)
            q = matrix.q[part].reshape(values.shape)
            _passes().round_blocks(values, np.reciprocal(scale), zero, np.float32(scheme.levels - 1), q)
            matrix.scale[part] = scale.reshape(-1, blocks)
            matrix.zero_point[part] = zero.reshape(-1, blocks)

    if threads == 1:
        solve(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(solve, range(threads)))
    return matrix


def _transposed(rows: np.ndarray) -> np.ndarray:
    """Blocks [blocks, size] as [size, blocks]; float32."""
    blocks = np.empty(rows.shape[::-1], np.float32)
    _passes().transpose(rows, blocks)
    return blocks


def _passes() -> ModuleType:
    """The compiled passes. What only reads or plans never loads a compiler."""
    from fastvlm_convert.quantization import block_passes

    return block_passes
