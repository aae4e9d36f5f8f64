"""Affine quantization without data: the best scale and zero point of every block.

What is minimized is `sum_i h_i (w_i - (q_i - z) s)^2` over a block, where s is a float16 number and h the
importance of an input column (the mean square of its input where there is calibration, else one). Candidates
come from a grid of ranges; each one's integers get the scale that least squares gives them, as in llama.cpp's
`make_qx_quants` and NNCF's scale estimation, rounded to float16 before it is judged. Plain rounding is among
the candidates, so that the result is never worse than it.

Least squares shrinks weights: its error points against them, and since trained weights are aligned with their
inputs, all outputs shrink together. The last step therefore takes the scale whose error is orthogonal to the
weights: that adds hardly any squared error, and the measured KL divergence falls.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.errors import RecipeError
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme
from fastvlm_convert.weights.storage import FLOAT16_MAX

SMALLEST_SCALE = 2.0**-24  # float16's smallest subnormal: a scale is never zero
LARGEST_SCALE = FLOAT16_MAX
CHUNK = 1 << 16  # weights searched at a time: what stays in a core's cache
REFINEMENTS = 2

# Ranges tried, as a block's own range divided by a factor. The more weights share a scale, the more it pays
# to clip the outliers; with 256 levels it hardly pays at all.
WIDEST = {4: 0.85, 8: 0.99}
NARROWEST = {16: 1.30, 32: 1.40, 64: 1.55, 128: 1.70}
NARROWEST_ROW = 2.5
NARROWEST_8_BIT = 1.06
STEPS = {4: 20, 8: 6}

Parameters = tuple[np.ndarray, np.ndarray]
"""Scales (representable in float16) and whole zero points of blocks; both float32 [rows, blocks]."""


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
    return _by_chunks(weight, scheme, lambda blocks: search_blocks(blocks, scheme, roots))


def round_to_nearest(weight: np.ndarray, scheme: AffineScheme) -> AffineMatrix:
    """Plain rounding to a block's own range; where symmetric, its largest magnitude gets `-2^(bits-1)`.

    Args:
        weight: float32 [rows, columns].
        scheme: Its block size must divide the columns.
    """
    block_size_of(weight.shape, scheme)
    return _by_chunks(weight, scheme, lambda blocks: next(candidates(blocks, scheme)))


def search_blocks(blocks: np.ndarray, scheme: AffineScheme, roots: np.ndarray | None = None) -> Parameters:
    """The best scale and zero point of every block.

    Args:
        blocks: float32 [rows, blocks, size].
        scheme: Bits and symmetry.
        roots: Root of the importance of the columns, float32 [blocks, size] or [rows, blocks, size], or None.
    """
    problem = _Problem(blocks, blocks if roots is None else blocks * roots, roots, scheme)
    tries = candidates(blocks, scheme, STEPS[scheme.bits])
    best = _Best.of(problem, *next(tries))
    plain = best.error
    for scale, zero in tries:
        best.keep(*problem.fitted(scale, zero))
    for _ in range(REFINEMENTS):
        best.keep(*problem.fitted(best.scale, best.zero))
    return _unshrunk(problem, best, plain), best.zero


def candidates(blocks: np.ndarray, scheme: AffineScheme, steps: int = 0) -> Iterator[Parameters]:
    """Scales and zero points worth trying: plain rounding first, then two for each of `steps` ranges.

    Args:
        blocks: float32 [rows, blocks, size].
        scheme: Bits and symmetry.
        steps: Ranges tried.
    """
    return (_symmetric if scheme.symmetric else _asymmetric)(blocks, scheme, steps)


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


def nearest(blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray, levels: int) -> np.ndarray:
    """`q - z` of the nearest representable weights, float32 [..., size] like `blocks`; parameters [...]."""
    steps = blocks * np.reciprocal(scale)[..., None]
    np.rint(steps, out=steps)
    np.maximum(steps, -zero[..., None], out=steps)
    return np.minimum(steps, (levels - 1 - zero)[..., None], out=steps)


def storable(scale: np.ndarray) -> np.ndarray:
    """Scales as they will be stored, in float32: float16 numbers, never zero and never infinite."""
    magnitude = np.clip(np.abs(scale), np.float32(SMALLEST_SCALE), np.float32(LARGEST_SCALE))
    return np.copysign(magnitude, scale).astype(np.float16).astype(np.float32)


@dataclass(frozen=True)
class _Problem:
    """Blocks whose parameters are wanted.

    Attributes:
        blocks: float32 [rows, blocks, size].
        weighted: The same times `roots`.
        roots: Root of the importance, broadcastable to `blocks`, or None.
        scheme: Bits and symmetry.
    """

    blocks: np.ndarray
    weighted: np.ndarray
    roots: np.ndarray | None
    scheme: AffineScheme

    def residual(self, scale: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Integers and errors of plain rounding, both weighted; float32 [rows, blocks, size]."""
        steps = nearest(self.blocks, scale, zero, self.scheme.levels)
        if self.roots is not None:
            steps *= self.roots
        error = steps * scale[..., None]
        return steps, np.subtract(self.weighted, error, out=error)

    def fitted(self, scale: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The scale that suits a candidate's integers best, the zero point and the squared error with both.

        Least squares around the candidate: `|e - d p|^2` is smallest at `d = e.p / p.p`. Expanding around the
        residual e instead of the weights keeps the difference of nearly equal sums out of float32.
        """
        steps, error = self.residual(scale, zero)
        cross, norm = _dot(error, steps), _dot(steps, steps)
        fit = storable(scale + cross / np.maximum(norm, np.finfo(np.float32).tiny))
        change = fit - scale
        return fit, zero, _dot(error, error) + change * (change * norm - 2 * cross)


@dataclass
class _Best:
    """The best parameters of every block so far and their squared error; all float32 [rows, blocks]."""

    scale: np.ndarray
    zero: np.ndarray
    error: np.ndarray

    @classmethod
    def of(cls, problem: _Problem, scale: np.ndarray, zero: np.ndarray) -> "_Best":
        """A first candidate, as it is."""
        error = problem.residual(scale, zero)[1]
        return cls(scale, zero, _dot(error, error))

    def keep(self, scale: np.ndarray, zero: np.ndarray, error: np.ndarray) -> None:
        """Take a candidate where it is better."""
        better = error < self.error
        self.scale = np.where(better, scale, self.scale)
        self.zero = np.where(better, zero, self.zero)
        self.error = np.where(better, error, self.error)


def _unshrunk(problem: _Problem, best: _Best, plain: np.ndarray) -> np.ndarray:
    """Scales with an error orthogonal to the weights, except where plain rounding would then be better."""
    steps, _ = problem.residual(best.scale, best.zero)
    overlap = _dot(problem.weighted, steps)
    usable = np.abs(overlap) > np.finfo(np.float32).tiny
    norm = _dot(problem.weighted, problem.weighted)
    scale = storable(np.where(usable, norm / np.where(usable, overlap, 1), best.scale))
    _, error = problem.residual(scale, best.zero)
    return np.where(_dot(error, error) <= plain, scale, best.scale)


def _shrinkings(scheme: AffineScheme, size: int, steps: int) -> np.ndarray:
    """Factors by which ranges are divided."""
    narrowest = NARROWEST.get(size, NARROWEST_ROW) if scheme.bits == 4 else NARROWEST_8_BIT
    return np.geomspace(WIDEST[scheme.bits], narrowest, steps, dtype=np.float32)


def _symmetric(blocks: np.ndarray, scheme: AffineScheme, steps: int) -> Iterator[Parameters]:
    """Scales of both signs: the sign decides which end of the block gets the extra level."""
    low, high = blocks.min(-1), blocks.max(-1)
    zero = np.full(low.shape, scheme.middle, np.float32)
    full = np.maximum(-low, high) / scheme.middle
    yield storable(np.where(-low > high, full, -full)), zero
    for factor in _shrinkings(scheme, blocks.shape[-1], steps):
        yield storable(full / factor), zero
        yield storable(-full / factor), zero


def _asymmetric(blocks: np.ndarray, scheme: AffineScheme, steps: int) -> Iterator[Parameters]:
    """Scales with the two zero points that center their range on the block's."""
    last = np.float32(scheme.levels - 1)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    full = (high - low) / last
    scale = storable(full)
    yield scale, np.clip(np.rint(-low / scale), 0, last)
    for factor in _shrinkings(scheme, blocks.shape[-1], steps):
        scale = storable(full / factor)
        below = np.floor(last / 2 - (low + high) / 2 / scale)
        for zero in (below, below + 1):
            yield scale, np.clip(zero, 0, last)


def _by_chunks(
    weight: np.ndarray, scheme: AffineScheme, parameters_of: Callable[[np.ndarray], Parameters]
) -> AffineMatrix:
    """Parameters and integers of a matrix, some rows at a time so that memory stays small."""
    rows, columns = weight.shape
    blocks = scheme.num_blocks(columns)
    matrix = AffineMatrix(
        scheme,
        np.empty((rows, columns), np.uint8),
        np.empty((rows, blocks), np.float16),
        np.empty((rows, blocks), np.uint8),
    )
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values = np.ascontiguousarray(weight[part], np.float32).reshape(-1, blocks, columns // blocks)
        scale, zero = parameters_of(values)
        q = nearest(values, scale, zero, scheme.levels) + zero[..., None]
        matrix.q[part] = q.reshape(-1, columns)
        matrix.scale[part] = scale
        matrix.zero_point[part] = zero
    return matrix


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products over the last axis."""
    return np.einsum("...i,...i->...", a, b)
