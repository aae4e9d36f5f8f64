"""GPTQ: rounding that makes up for each error in the weights not yet rounded (arXiv:2210.17323).

With inputs x of a layer and H = sum x x^T, the error of its outputs is `tr((W - Q) H (W - Q)^T)`. With
H = U D U^T, U unit upper triangular, that is `sum_j D_j (t_j - q_j)^2`, where the target t_j is the weight of
column j plus what the errors of the columns before it ask of it: `t_j = w_j + sum_{i<j} (w_i - q_i) U_ij`
(LDLQ, arXiv:2307.13304; the same numbers as GPTQ's). One Cholesky factorization gives U and D; no inverse.

Beyond the paper:

* A block gets the scale and zero point with which it ends, error compensation included, at the smallest
  error, not those that fit its weights alone. They are searched when its turn comes, on compensated weights.
* Blocks take turns by importance, and so do the columns within one. They stay contiguous as stored.
* A row that fares better the paper's own way (order over all blocks, parameters given) takes that.

Rows never interact, so layers with the same inputs (q, k, v; gate, up) are best stacked into one matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.quantization.candidates import Parameters, candidates, storable
from fastvlm_convert.quantization.error_compensation import (
    PANEL,
    BlockFactor,
    Factor,
    factorize,
    importance_order,
    panel_target,
    round_by_panels,
    round_columns,
)
from fastvlm_convert.quantization.search import block_size_of, quantize_affine, round_to_nearest
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme

STEPS = {4: 12, 8: 2}  # ranges tried per block
WORKING_SET = 1 << 20  # errors held while the candidates of a block are tried


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    scheme: AffineScheme,
    *,
    damping: float = 0.01,
    activation_order: bool = True,
) -> AffineMatrix:
    """Quantize a matrix so that its outputs change least.

    Args:
        weight: float32 [rows, columns].
        hessian: float64 [columns, columns], see `hessian_of`; its scale does not matter.
        scheme: Its block size must divide the columns.
        damping: Share of the mean diagonal that is added to the diagonal; raised until the matrix factorizes.
        activation_order: Important blocks, and columns within a block, first.
    """
    size = block_size_of(weight.shape, scheme)
    order = importance_order(np.diag(hessian), size) if activation_order else np.arange(len(hessian))
    factor = factorize(hessian, order, damping)
    problem = _Problem(scheme, factor, np.ascontiguousarray(weight.T[order], np.float32), size)
    rounded = _Rounded.start(problem, weight)
    for panel in problem.panels():
        target = panel_target(problem.weight, rounded.error, factor, panel)
        panel_factor = factor.unit[panel, panel], factor.variance[panel]
        rounded.take(panel, _solve(problem, rounded, panel, target, panel_factor))
    if activation_order and not problem.is_fixed:
        _take_static_rows(problem, rounded, round_to_nearest(weight, scheme), hessian, damping)
    return rounded.matrix()


@dataclass(frozen=True)
class _Problem:
    """A matrix to quantize; columns come first and in the factor's order.

    Attributes:
        scheme: How.
        factor: The Hessian.
        weight: float32 [columns, rows].
        block_size: Columns that share a scale and a zero point.
    """

    scheme: AffineScheme
    factor: Factor
    weight: np.ndarray
    block_size: int

    @property
    def is_fixed(self) -> bool:
        """Whether scales and zero points are given from the start, because a block is more than a panel."""
        return self.block_size > PANEL

    def panels(self) -> Iterator[slice]:
        """Columns solved together: one block, or part of one where parameters are fixed."""
        columns = len(self.weight)
        size = PANEL if self.is_fixed else self.block_size
        return (slice(start, min(start + size, columns)) for start in range(0, columns, size))

    def block_of(self, panel: slice) -> int:
        """The block of a panel, as stored."""
        return int(self.factor.order[panel.start]) // self.block_size


@dataclass(frozen=True)
class _Solution:
    """A panel rounded; `error = target - steps * scale`, and what that costs.

    Attributes:
        steps: `q - z`, float32 [columns, rows].
        scale: float32 [rows], representable in float16.
        zero: float32 [rows].
        cost: float32 [rows].
    """

    steps: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    cost: np.ndarray


class _Rounded:
    """A matrix as it is rounded so far: working arrays, which panels overwrite as they are solved.

    Attributes:
        error: Weight minus its rounded value, float32 [columns, rows]; zero where nothing is rounded yet.
        steps: `q - z`, float32 [columns, rows].
        scale: float32 [blocks, rows].
        zero: float32 [blocks, rows].
    """

    def __init__(self, problem: _Problem, scale: np.ndarray, zero: np.ndarray) -> None:
        self._problem = problem
        self.error = np.zeros_like(problem.weight)
        self.steps = np.zeros_like(problem.weight)
        self.scale = scale
        self.zero = zero

    @classmethod
    def start(cls, problem: _Problem, weight: np.ndarray) -> "_Rounded":
        """Nothing rounded yet; where parameters are fixed, those of a search on [rows, columns] as stored."""
        columns, rows = problem.weight.shape
        if problem.is_fixed:
            importance = np.empty(columns, np.float32)
            importance[problem.factor.order] = problem.factor.variance
            found = quantize_affine(weight, problem.scheme, importance)
            return cls(problem, found.scale.T.astype(np.float32), found.zero_point.T.astype(np.float32))
        shape = (columns // problem.block_size, rows)
        return cls(problem, np.ones(shape, np.float32), np.zeros(shape, np.float32))

    def take(self, panel: slice, solution: _Solution) -> None:
        """Overwrite a panel."""
        block = self._problem.block_of(panel)
        self.steps[panel] = solution.steps
        self.scale[block] = solution.scale
        self.zero[block] = solution.zero
        self.error[panel] = self._problem.weight[panel] - solution.steps * solution.scale

    def matrix(self) -> AffineMatrix:
        """The matrix, rows first and columns as stored."""
        order = self._problem.factor.order
        steps = np.empty_like(self.steps)
        steps[order] = self.steps
        zero = np.repeat(self.zero, self._problem.block_size, axis=0)
        return AffineMatrix(
            self._problem.scheme,
            np.ascontiguousarray((steps + zero).T.astype(np.uint8)),
            np.ascontiguousarray(self.scale.T.astype(np.float16)),
            np.ascontiguousarray(self.zero.T.astype(np.uint8)),
        )


def _take_static_rows(
    problem: _Problem, rounded: _Rounded, plain: AffineMatrix, hessian: np.ndarray, damping: float
) -> None:
    """Round with given parameters, columns by importance over all blocks; take the rows that this suits.

    Where a few columns dwarf the rest, their order matters more than a block's parameters.

    Args:
        problem: The matrix.
        rounded: All of its panels are solved.
        plain: The scales and zero points.
        hessian: As `gptq` takes it.
        damping: As `gptq` takes it.
    """
    size = problem.block_size
    scale, zero = plain.scale.T.astype(np.float32), plain.zero_point.T.astype(np.float32)
    factor = factorize(hessian, importance_order(np.diag(hessian), 1), damping)

    def nearest(place: int, values: np.ndarray) -> np.ndarray:
        block = factor.order[place] // size
        steps = np.rint(values / scale[block])
        return np.clip(steps, -zero[block], problem.scheme.levels - 1 - zero[block]) * scale[block]

    source = np.empty_like(problem.weight)
    source[problem.factor.order] = problem.weight
    error = np.empty_like(source)
    error[factor.order] = round_by_panels(source[factor.order], factor, nearest)
    steps = np.rint((source - error) / np.repeat(scale, size, 0))[problem.factor.order]
    error = error[problem.factor.order]
    better = _costs(problem, error) < _costs(problem, rounded.error)
    for old, new in (
        (rounded.steps, steps),
        (rounded.error, error),
        (rounded.scale, scale),
        (rounded.zero, zero),
    ):
        np.copyto(old, new, where=better)


def _costs(problem: _Problem, error: np.ndarray) -> np.ndarray:
    """What errors [columns, rows] cost, float32 [rows]."""
    return np.einsum("cr,cr->r", error, problem.factor.matrix @ error)


def _solve(
    problem: _Problem, rounded: _Rounded, panel: slice, target: np.ndarray, factor: BlockFactor
) -> _Solution:
    """The best of the candidates for a panel, with error compensation inside it; some rows at a time.

    Args:
        problem: The matrix.
        rounded: Gives the parameters that the panel's block has so far.
        panel: The columns.
        target: What `round_columns` is to round, float32 [columns, rows].
        factor: Of the panel alone.
    """
    block = problem.block_of(panel)
    tries = 1 if problem.is_fixed else 2 * STEPS[problem.scheme.bits] + 2
    count = max(1, WORKING_SET // (len(target) * tries))
    parts = []
    for start in range(0, target.shape[1], count):
        rows = slice(start, start + count)
        part = np.ascontiguousarray(target[:, rows])
        scale, zero = rounded.scale[block, rows], rounded.zero[block, rows]
        if problem.is_fixed:
            tried = scale[None], zero[None]
        else:
            tried = _candidates(part, scale, zero, problem.scheme)
        parts.append(_best(problem, part, factor, tried))
    return _Solution(
        np.concatenate([part.steps for part in parts], axis=-1),
        np.concatenate([part.scale for part in parts]),
        np.concatenate([part.zero for part in parts]),
        np.concatenate([part.cost for part in parts]),
    )


def _candidates(target: np.ndarray, scale: np.ndarray, zero: np.ndarray, scheme: AffineScheme) -> Parameters:
    """Parameters to try on a block, those it has included; both float32 [candidates, rows]."""
    tries = list(candidates(target.T[:, None], scheme, STEPS[scheme.bits]))
    scales = np.stack([*(s[:, 0] for s, _ in tries), scale])
    zeros = np.stack([*(z[:, 0] for _, z in tries), zero])
    return scales, zeros


def _best(problem: _Problem, target: np.ndarray, factor: BlockFactor, tries: Parameters) -> _Solution:
    """The best candidate of each row; its scale is fitted to its steps where parameters are not fixed.

    Args:
        problem: The matrix.
        target: Some rows of a panel, float32 [columns, rows].
        factor: Of the panel.
        tries: Parameters, float32 [candidates, rows] each.
    """
    (unit, variance), (scales, zeros) = factor, tries
    inverse, highest = np.reciprocal(scales), problem.scheme.levels - 1 - zeros

    def nearest(_: int, values: np.ndarray) -> np.ndarray:
        steps = np.rint(values * inverse)
        return np.minimum(np.maximum(steps, -zeros, out=steps), highest, out=steps) * scales

    error = round_columns(target, unit, nearest)
    left = (unit.T @ error.reshape(len(target), -1)).reshape(error.shape)
    cost = np.einsum("ckr,ckr,c->kr", left, left, variance, optimize=True)
    choice, row = cost.argmin(0), np.arange(target.shape[1])
    scale, zero, error = scales[choice, row], zeros[choice, row], error[:, choice, row]
    steps = np.rint((target - error) / scale)
    if problem.is_fixed:
        return _Solution(steps, scale, zero, cost[choice, row])
    scale, fitted_cost = _fit(scale, steps, error, factor)
    return _Solution(steps, scale, zero, fitted_cost)


def _fit(
    scale: np.ndarray, steps: np.ndarray, error: np.ndarray, factor: BlockFactor
) -> tuple[np.ndarray, np.ndarray]:
    """The float16 scale that suits the steps best by least squares, and the cost; float32 [rows] each.

    Example, with H = 1: targets (0.9, 3.3) have the steps (1, 3) at a scale of 1, and the errors (-0.1, 0.3).
    Errors times steps are 0.8, steps times steps 10. So the scale becomes 1 + 0.8 / 10 = 1.08, and the cost
    falls by 0.8^2 / 10 from 0.1 to 0.036.
    """
    unit, variance = factor
    root = np.sqrt(variance)[:, None]
    error, steps = root * (unit.T @ error), root * (unit.T @ steps)
    cross, norm = np.einsum("cr,cr->r", error, steps), np.einsum("cr,cr->r", steps, steps)
    fit = storable(scale + cross / np.maximum(norm, np.finfo(np.float32).tiny))
    change = fit - scale
    gain = np.maximum(change * (2 * cross - change * norm), 0)
    return np.where(gain > 0, fit, scale), np.einsum("cr,cr->r", error, error) - gain
