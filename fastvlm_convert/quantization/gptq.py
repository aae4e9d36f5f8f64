"""GPTQ: rounding that makes up for each error in the weights not yet rounded (arXiv:2210.17323).

With inputs x of a layer and H = sum x x^T, the error of its outputs is `tr((W - Q) H (W - Q)^T)`. With
H = U D U^T, U unit upper triangular, that is `sum_j D_j (t_j - q_j)^2`, where the target t_j is the weight of
column j plus what the errors of the columns before it ask of it: `t_j = w_j + sum_{i<j} (w_i - q_i) U_ij`
(LDLQ, arXiv:2307.13304; the same numbers as GPTQ's). One Cholesky factorization gives U and D; no inverse.

Beyond the paper:

* A block gets the scale and zero point with which it ends, error compensation included, at the smallest
  error, not those that fit its weights alone. They are searched when its turn comes, on compensated weights.
* Blocks take turns by importance, and so do the columns within one. They stay contiguous as stored.
* A row that fares better the paper's own way (order over all blocks, parameters given) takes that. This is
  tried where a matrix is narrow, or a few columns dwarf the rest.

Rows never interact, so layers with the same inputs (q, k, v; gate, up) are best stacked into one matrix.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.arithmetic import ceil_div
from fastvlm_convert.processors import num_threads
from fastvlm_convert.quantization.candidates import Parameters, candidates, storable
from fastvlm_convert.quantization.error_compensation import (
    PANEL,
    BlockFactor,
    Factor,
    by_panels,
    factorize,
    importance_order,
    panel_target,
)
from fastvlm_convert.quantization.search import block_size_of, quantize_affine, round_to_nearest
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme

STEPS = {4: 12, 8: 2}  # ranges tried per block
FEWEST_ROWS = 256  # worth a thread of their own
NARROW = 512  # columns up to which another order is always tried: it takes little time
FEW_COLUMNS = 0.01  # a share of a wider matrix's columns; if they make more than `DOMINANT` of the inputs'
DOMINANT = 0.2  # squares, order matters: else the paper's own way saves 0.9 % of the error at most


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
    if activation_order and not problem.is_fixed and _depends_on_order(np.diag(hessian)):
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
    """A panel rounded.

    Attributes:
        steps: `q - z`, float32 [columns, rows].
        scale: float32 [rows], representable in float16.
        zero: float32 [rows].
    """

    steps: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


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


def _depends_on_order(importance: np.ndarray) -> bool:
    """Whether it is worth trying another order of columns; float64 [columns]."""
    count = ceil_div(len(importance), round(1 / FEW_COLUMNS))
    few = np.sort(importance)[-count:].sum()
    return bool(len(importance) <= NARROW or few > DOMINANT * importance.sum())


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

    source = np.empty_like(problem.weight)
    source[problem.factor.order] = problem.weight
    steps = np.empty_like(source)

    def rounded_panel(panel: slice, target: np.ndarray) -> np.ndarray:
        places = factor.order[panel] // size
        blocks, used = np.unique(places, return_inverse=True)
        unit, given = factor.unit[panel, panel], (scale[blocks], zero[blocks])
        steps[panel] = _round_panel(target, unit, used, *given, problem.scheme)
        return steps[panel] * scale[places]

    error = by_panels(source[factor.order], factor, rounded_panel)
    steps, error = _moved(steps, factor.order, problem), _moved(error, factor.order, problem)
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


def _moved(values: np.ndarray, order: np.ndarray, problem: _Problem) -> np.ndarray:
    """Columns in some order, in the order of the problem's factor; [columns, rows] each."""
    stored = np.empty_like(values)
    stored[order] = values
    return stored[problem.factor.order]


def _solve(
    problem: _Problem, rounded: _Rounded, panel: slice, target: np.ndarray, factor: BlockFactor
) -> _Solution:
    """The best of the candidates for a panel, with error compensation inside it.

    Args:
        problem: The matrix.
        rounded: Gives the parameters that the panel's block has so far.
        panel: The columns.
        target: What is to be rounded, see `panel_target`; float32 [columns, rows].
        factor: Of the panel alone.
    """
    block, scheme, unit = problem.block_of(panel), problem.scheme, factor[0]
    scale, zero = rounded.scale[block], rounded.zero[block]
    together = np.zeros(len(target), np.int64)
    if problem.is_fixed:
        return _Solution(_round_panel(target, unit, together, scale[None], zero[None], scheme), scale, zero)
    scale, zero = _best(target, factor, _candidates(target, scale, zero, scheme), scheme)
    steps = _round_panel(target, unit, together, scale[None], zero[None], scheme)
    return _Solution(steps, _fitted(scale, steps, target - steps * scale, factor), zero)


def _candidates(target: np.ndarray, scale: np.ndarray, zero: np.ndarray, scheme: AffineScheme) -> Parameters:
    """Parameters to try on a block, those it has included; both float32 [candidates, rows]."""
    tries = list(candidates(target.T[:, None], scheme, STEPS[scheme.bits]))
    scales = np.stack([*(s[:, 0] for s, _ in tries), scale])
    zeros = np.stack([*(z[:, 0] for _, z in tries), zero])
    return scales, zeros


def _best(target: np.ndarray, factor: BlockFactor, tries: Parameters, scheme: AffineScheme) -> Parameters:
    """The parameters of each row with which a panel costs least; both float32 [rows].

    Args:
        target: What is to be rounded, float32 [columns, rows].
        factor: Of the panel.
        tries: Parameters, float32 [candidates, rows] each.
        scheme: How.
    """
    from fastvlm_convert.quantization.column_passes import sum_costs  # Numba; only where it is needed

    (unit, variance), (scale, zero) = factor, tries
    lower, cost = np.ascontiguousarray(unit.T), np.empty_like(scale)

    def try_rows(rows: slice) -> None:
        found = np.empty_like(scale[:, rows], order="C")
        given = _limits(scale[:, rows], zero[:, rows], scheme)
        sum_costs(np.ascontiguousarray(target[:, rows]), lower, variance, given, found)
        cost[:, rows] = found

    _in_threads(target.shape[1], try_rows)
    choice, row = cost.argmin(0), np.arange(target.shape[1])
    return scale[choice, row], zero[choice, row]


def _round_panel(
    target: np.ndarray,
    unit: np.ndarray,
    block: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    scheme: AffineScheme,
) -> np.ndarray:
    """Round columns in turn with given parameters: `q - z`, float32 [columns, rows].

    Args:
        target: What is to be rounded, see `panel_target`; float32 [columns, rows].
        unit: Of the panel, see `Factor`.
        block: Which of the parameters each column takes, int64 [columns].
        scale: float32 [parameters, rows].
        zero: Like `scale`.
        scheme: How.
    """
    from fastvlm_convert.quantization.column_passes import round_in_turn  # Numba; only where it is needed

    lower, steps = np.ascontiguousarray(unit.T), np.empty_like(target)

    def round_rows(rows: slice) -> None:
        wanted = np.ascontiguousarray(target[:, rows])
        found = np.empty_like(wanted)
        round_in_turn(wanted, lower, block, _limits(scale[:, rows], zero[:, rows], scheme), found)
        steps[:, rows] = found

    _in_threads(target.shape[1], round_rows)
    return steps


def _limits(scale: np.ndarray, zero: np.ndarray, scheme: AffineScheme) -> np.ndarray:
    """Scale, one by the scale, and the least and the greatest `q - z`; float32 [4, parameters, rows]."""
    return np.stack([scale, np.reciprocal(scale), -zero, np.float32(scheme.levels - 1) - zero])


def _in_threads(rows: int, solve: Callable[[slice], None]) -> None:
    """Call a function with all rows, some in each thread."""
    threads = min(num_threads(), ceil_div(rows, FEWEST_ROWS))
    step = ceil_div(rows, threads)
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    if len(parts) == 1:
        solve(parts[0])
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(solve, parts))


def _fitted(scale: np.ndarray, steps: np.ndarray, error: np.ndarray, factor: BlockFactor) -> np.ndarray:
    """The float16 scale that suits the steps best by least squares, float32 [rows].

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
    return np.where(change * (2 * cross - change * norm) > 0, fit, scale)
