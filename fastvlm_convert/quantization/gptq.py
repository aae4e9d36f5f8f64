"""GPTQ: rounding that makes up for each error in the weights not yet rounded (arXiv:2210.17323).

With inputs x of a layer and H = sum x x^T, the error of its outputs is `tr((W - Q) H (W - Q)^T)`. With
H = U D U^T, U unit upper triangular, that is `sum_j D_j (t_j - q_j)^2`, where the target t_j is the weight of
column j plus what the errors of the columns before it ask of it: `t_j = w_j + sum_{i<j} (w_i - q_i) U_ij`
(LDLQ, arXiv:2307.13304; the same numbers as GPTQ's). One Cholesky factorisation gives U and D; no inverse.

Beyond the paper:

* A block gets the scale and zero point with which it ends, error feedback included, at the smallest error,
  not those that fit its weights alone. They are searched when its turn comes, on the compensated weights.
* Blocks take turns by importance, and so do the columns within one. They stay contiguous as stored.
* A row that fares better the paper's own way (order over all blocks, parameters given) takes that.
* Then some sweeps: each block is solved again while all others stay (block coordinate descent), and takes the
  new solution where that lowers the exact error.

Rows never interact, so layers with the same inputs (q, k, v; gate, up) are best stacked into one matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.quantization.error_compensation import (
    PANEL,
    BlockFactor,
    Factor,
    block_factor,
    factorize,
    feedback,
    importance_order,
    round_in_turn,
)
from fastvlm_convert.quantization.search import (
    Parameters,
    block_size_of,
    candidates,
    quantize_affine,
    round_to_nearest,
    storable,
)
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme

STEPS = {4: 12, 8: 2}  # ranges tried per block
WORKING_SET = 1 << 18  # errors held while the candidates of a block are tried


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    scheme: AffineScheme,
    *,
    damping: float = 0.01,
    activation_order: bool = True,
    sweeps: int = 2,
) -> AffineMatrix:
    """Quantizes a matrix so that its outputs change least.

    Args:
        weight: float32 [rows, columns].
        hessian: float64 [columns, columns], see `hessian_of`; its scale does not matter.
        scheme: Its block size must divide the columns.
        damping: Share of the mean diagonal that is added to the diagonal; raised until the matrix factorises.
        activation_order: Important blocks, and columns within a block, first.
        sweeps: Times that every block is solved again in the end.
    """
    size = block_size_of(weight.shape, scheme)
    order = importance_order(np.diag(hessian), size) if activation_order else np.arange(len(hessian))
    solver = _Solver.of(weight, factorize(hessian, order, damping), scheme)
    for panel in solver.panels():
        solver.first(panel)
    if activation_order and not solver.fixed:
        solver.restart(round_to_nearest(weight, scheme), hessian, damping)
    for _ in range(sweeps):
        for panel in solver.panels():
            solver.again(panel)
    return solver.result()


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


@dataclass(frozen=True)
class _Solver:
    """A matrix being quantized; columns come first and in the factor's order.

    Attributes:
        scheme: How.
        factor: The Hessian.
        weight: float32 [columns, rows].
        error: Weight minus its rounded value so far, float32 [columns, rows].
        steps: `q - z`, float32 [columns, rows].
        scale: float32 [blocks, rows].
        zero: float32 [blocks, rows].
        fixed: Whether scales and zero points are given, because a block is more than a panel.
    """

    scheme: AffineScheme
    factor: Factor
    weight: np.ndarray
    error: np.ndarray
    steps: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    fixed: bool

    @classmethod
    def of(cls, weight: np.ndarray, factor: Factor, scheme: AffineScheme) -> "_Solver":
        """A matrix of which nothing is rounded yet."""
        rows, columns = weight.shape
        blocks = scheme.num_blocks(columns)
        transposed = np.ascontiguousarray(weight.T[factor.order], np.float32)
        fixed = columns // blocks > PANEL
        if fixed:
            importance = np.empty(columns, np.float32)
            importance[factor.order] = factor.variance
            start = quantize_affine(weight, scheme, importance)
            scale, zero = start.scale.T.astype(np.float32), start.zero_point.T.astype(np.float32)
        else:
            scale, zero = np.ones((blocks, rows), np.float32), np.zeros((blocks, rows), np.float32)
        return cls(
            scheme,
            factor,
            transposed,
            np.zeros_like(transposed),
            np.zeros_like(transposed),
            scale,
            zero,
            fixed,
        )

    def panels(self) -> Iterator[slice]:
        """Columns solved together: one block, or part of one where parameters are fixed."""
        columns = len(self.weight)
        size = PANEL if self.fixed else columns // len(self.scale)
        return (slice(start, min(start + size, columns)) for start in range(0, columns, size))

    def first(self, panel: slice) -> None:
        """Rounds a panel after its predecessors; later columns can still make up for its errors."""
        before = slice(0, panel.start)
        unit = self.factor.unit[panel, panel]
        asked = self.factor.unit[before, panel].T @ self.error[before]
        target = self.weight[panel] + np.linalg.solve(unit.T, asked)
        self._store(panel, self._solve(target, (unit, self.factor.variance[panel]), panel))

    def again(self, panel: slice) -> None:
        """Rounds a panel anew while all others stay, and keeps that in the rows where it costs less.

        The cost of a panel alone is `(t - q) M (t - q)` with M its part of the Hessian, and t where the other
        columns' errors would have it.
        """
        matrix = self.factor.matrix[panel, panel]
        slope = self.factor.matrix[panel] @ self.error
        pull = np.linalg.solve(matrix.astype(np.float64), slope).astype(np.float32)
        cost = np.einsum("cr,cr->r", pull, matrix @ pull)
        target = self.weight[panel] - self.error[panel] + pull
        solution = self._solve(target, block_factor(matrix), panel)
        self._store(panel, solution, solution.cost < cost)

    def restart(self, plain: AffineMatrix, hessian: np.ndarray, damping: float) -> None:
        """Rounds with given parameters, columns by importance over all blocks; keeps the rows this suits.

        Where a few columns dwarf the rest, their order matters more than a block's parameters.
        """
        columns = len(self.weight)
        size = columns // len(self.scale)
        scale, zero = plain.scale.T.astype(np.float32), plain.zero_point.T.astype(np.float32)
        factor = factorize(hessian, importance_order(np.diag(hessian), 1), damping)

        def nearest(place: int, values: np.ndarray) -> np.ndarray:
            block = factor.order[place] // size
            steps = np.rint(values / scale[block])
            return np.clip(steps, -zero[block], self.scheme.levels - 1 - zero[block]) * scale[block]

        source = np.empty_like(self.weight)
        source[self.factor.order] = self.weight
        error = np.empty_like(source)
        error[factor.order] = round_in_turn(source[factor.order], factor, nearest)
        steps = np.rint((source - error) / np.repeat(scale, size, 0))[self.factor.order]
        error = error[self.factor.order]
        better = self._costs(error) < self._costs(self.error)
        stored = self.steps, self.error, self.scale, self.zero
        for old, new in zip(stored, (steps, error, scale, zero), strict=True):
            np.copyto(old, new, where=better)

    def _costs(self, error: np.ndarray) -> np.ndarray:
        """What errors cost, float32 [rows]."""
        return np.einsum("cr,cr->r", error, self.factor.matrix @ error)

    def result(self) -> AffineMatrix:
        """The matrix, rows first and columns as they were."""
        columns = len(self.weight)
        order = self.factor.order
        steps = np.empty_like(self.steps)
        steps[order] = self.steps
        zero = np.repeat(self.zero, columns // len(self.zero), axis=0)
        return AffineMatrix(
            self.scheme,
            np.ascontiguousarray((steps + zero).T.astype(np.uint8)),
            np.ascontiguousarray(self.scale.T.astype(np.float16)),
            np.ascontiguousarray(self.zero.T.astype(np.uint8)),
        )

    def _block(self, panel: slice) -> int:
        """The block of a panel, as stored."""
        return int(self.factor.order[panel.start]) // (len(self.weight) // len(self.scale))

    def _store(self, panel: slice, solution: _Solution, where: np.ndarray | bool = True) -> None:
        """Takes a solution, in some rows only."""
        block = self._block(panel)
        np.copyto(self.steps[panel], solution.steps, where=where)
        np.copyto(self.scale[block], solution.scale, where=where)
        np.copyto(self.zero[block], solution.zero, where=where)
        rounded = solution.steps * solution.scale
        np.copyto(self.error[panel], self.weight[panel] - rounded, where=where)

    def _solve(self, target: np.ndarray, factor: BlockFactor, panel: slice) -> _Solution:
        """The best of the candidates for a panel, with error feedback inside it; some rows at a time."""
        block = self._block(panel)
        tries = 1 if self.fixed else 2 * STEPS[self.scheme.bits] + 2
        count = max(1, WORKING_SET // (len(target) * tries))
        parts = []
        for start in range(0, target.shape[1], count):
            rows = slice(start, start + count)
            part = np.ascontiguousarray(target[:, rows])
            known = self.scale[block, rows], self.zero[block, rows]
            tried = (known[0][None], known[1][None]) if self.fixed else self._candidates(part, *known)
            parts.append(self._best(part, factor, tried))
        return _Solution(*(np.concatenate(field, axis=-1) for field in zip(*parts, strict=True)))

    def _candidates(self, target: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> Parameters:
        """Parameters to try on a block, those it has included; both float32 [candidates, rows]."""
        tries = list(candidates(target.T[:, None], self.scheme, STEPS[self.scheme.bits]))
        scales = np.stack([*(s[:, 0] for s, _ in tries), scale])
        zeros = np.stack([*(z[:, 0] for _, z in tries), zero])
        return scales, zeros

    def _best(self, target: np.ndarray, factor: BlockFactor, tries: Parameters) -> tuple[np.ndarray, ...]:
        """Steps, scale, zero point and cost of the best candidate of each row."""
        (unit, variance), (scales, zeros) = factor, tries
        inverse, highest = np.reciprocal(scales), self.scheme.levels - 1 - zeros

        def nearest(_: int, values: np.ndarray) -> np.ndarray:
            steps = np.rint(values * inverse)
            return np.minimum(np.maximum(steps, -zeros, out=steps), highest, out=steps) * scales

        error = feedback(target, unit, nearest)
        left = (unit.T @ error.reshape(len(target), -1)).reshape(error.shape)
        cost = np.einsum("ckr,ckr,c->kr", left, left, variance, optimize=True)
        choice, row = cost.argmin(0), np.arange(target.shape[1])
        scale, zero, error = scales[choice, row], zeros[choice, row], error[:, choice, row]
        steps = np.rint((target - error) / scale)
        if self.fixed:
            return steps, scale, zero, cost[choice, row]
        scale, cost = _fit(scale, steps, error, factor)
        return steps, scale, zero, cost


def _fit(
    scale: np.ndarray, steps: np.ndarray, error: np.ndarray, factor: BlockFactor
) -> tuple[np.ndarray, np.ndarray]:
    """The float16 scale that suits the steps best by least squares, and the cost; float32 [rows] each."""
    unit, variance = factor
    root = np.sqrt(variance)[:, None]
    error, steps = root * (unit.T @ error), root * (unit.T @ steps)
    cross, norm = np.einsum("cr,cr->r", error, steps), np.einsum("cr,cr->r", steps, steps)
    fit = storable(scale + cross / np.maximum(norm, np.finfo(np.float32).tiny))
    change = fit - scale
    gain = np.maximum(change * (2 * cross - change * norm), 0)
    return np.where(gain > 0, fit, scale), np.einsum("cr,cr->r", error, error) - gain
