"""Error compensation: round columns in turn, each making up for the errors of those before it.

With H = U D U^T (see `gptq`) the error of a layer's outputs is a weighted sum of squares, one per column, in
which the target of a column is its weight plus what the errors of the columns before it ask of it.

Example: a row (0.4, 0.4) is rounded to whole numbers, and H = [[1, 1/2], [1/2, 1]], so that U_01 = 1/2 and
D = (3/4, 1). Rounding to nearest gives (0, 0), which costs 0.16 + 0.16 + 2 * 0.16 / 2 = 0.48. Rounding in
turn, the first column becomes 0 with an error of 0.4; the target of the second is 0.4 + 0.4 / 2 = 0.6, which
becomes 1. That costs 0.16 + 0.36 - 2 * 0.24 / 2 = 0.28: the sum 3/4 * 0.4^2 + 1 * (0.6 - 1)^2 from above.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

PANEL = 128  # columns rounded between two matrix products
TOKENS = 4096  # summed in float32 at a time
MAX_DAMPING = 10.0

Nearest = Callable[[int, np.ndarray], np.ndarray]
"""Rounds values to what the column at some place can hold."""

RoundPanel = Callable[[slice, np.ndarray], np.ndarray]
"""Rounds the columns at some places in turn, given what `panel_target` gives of them."""

BlockFactor = tuple[np.ndarray, np.ndarray]
"""`unit` and `variance` of some columns, see `Factor`."""


def hessian_of(inputs: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """`sum_t w_t x_t x_t^T`, float64 [columns, columns].

    Args:
        inputs: float32 [tokens, columns].
        weights: Importance of the tokens, float32 [tokens]; None for equal weights.
    """
    from fastvlm_convert.quantization.linear_algebra import add_gram, mirror  # torch; with data it is there

    columns = inputs.shape[1]
    hessian = np.zeros((columns, columns))
    for start in range(0, len(inputs), TOKENS):
        x = inputs[start : start + TOKENS]
        add_gram(hessian, x if weights is None else x * np.sqrt(weights[start : start + TOKENS, None]))
    mirror(hessian)
    return hessian


def output_error(weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray) -> float:
    """`tr((W - Q) H (W - Q)^T)`: the squared error of a layer's outputs over the inputs that made H."""
    error = weight.astype(np.float64) - quantized
    return float(np.sum((error @ hessian) * error))


def importance_order(importance: np.ndarray, size: int) -> np.ndarray:
    """Columns by falling importance, blocks of `size` kept together; int64 [columns]."""
    blocks = importance.reshape(-1, size)
    inside = np.argsort(-blocks, axis=1, kind="stable")
    first = np.argsort(-blocks.sum(1), kind="stable")
    return (first[:, None] * size + inside[first]).reshape(-1)


@dataclass(frozen=True)
class Factor:
    """A Hessian, damped, with a mean diagonal of 1 and reordered: `matrix = unit diag(variance) unit^T`.

    Attributes:
        order: The column that each place holds, int64 [columns].
        matrix: float32 [columns, columns].
        unit: Unit upper triangular, float32 [columns, columns].
        variance: What a column's error costs after all later ones made up for it, float32 [columns].
    """

    order: np.ndarray
    matrix: np.ndarray
    unit: np.ndarray
    variance: np.ndarray


def factorize(hessian: np.ndarray, order: np.ndarray, damping: float) -> Factor:
    """Normalize, damp and factorize a Hessian, all in float64.

    The damping rises tenfold until the matrix is positive definite. A column that no input ever used has
    nothing but damping on its diagonal: it is rounded to nearest and disturbs no other.

    Args:
        hessian: float64 [columns, columns].
        order: The column that each place is to hold, int64 [columns].
        damping: Share of the mean diagonal that is added to the diagonal.

    Raises:
        ValueError: The matrix is no Hessian: not finite, or not positive semidefinite.
    """
    from fastvlm_convert.quantization.linear_algebra import cholesky  # torch; with data it is there

    mean = np.trace(hessian) / len(hessian)
    if not np.isfinite(mean) or mean < 0:
        raise ValueError(f"a Hessian with a mean diagonal of {mean}")
    matrix = hessian[np.ix_(order, order)] / (mean or 1.0)
    diagonal = np.einsum("ii->i", matrix)  # a view
    added = 0.0
    while damping <= MAX_DAMPING:
        diagonal += damping - added
        added = damping
        lower = cholesky(np.ascontiguousarray(matrix[::-1, ::-1]))
        if lower is not None:
            return Factor(order, matrix.astype(np.float32), *_unit_upper(lower))
        damping = max(10 * damping, 1e-6)
    raise ValueError("the Hessian is not positive semidefinite")


def block_factor(matrix: np.ndarray) -> BlockFactor:
    """`matrix = U diag(d) U^T` with U unit upper triangular; both float32."""
    return _unit_upper(np.linalg.cholesky(matrix[::-1, ::-1].astype(np.float64)))


def _unit_upper(lower: np.ndarray) -> BlockFactor:
    """`unit` and `variance` from the Cholesky factor of the matrix with its rows and columns reversed."""
    upper = lower[::-1, ::-1]
    diagonal = np.diag(upper)
    return (upper / diagonal).astype(np.float32), np.square(diagonal).astype(np.float32)


def round_columns(target: np.ndarray, unit: np.ndarray, nearest: Nearest) -> np.ndarray:
    """Round columns in turn, each after the errors of those before it were added to it.

    Args:
        target: float32 [columns, ...]; columns first, so that each is contiguous.
        unit: Unit upper triangular, float32 [columns, columns].
        nearest: Rounds values of the shape of one column, or of one that it broadcasts to, by its place.

    Returns:
        `target - rounded`, float32 [columns, ...].
    """
    shape = nearest(0, target[0]).shape
    error = np.empty((len(target), *shape), np.float32)
    flat = error.reshape(len(target), -1)
    for column, values in enumerate(target):
        wanted = values + (unit[:column, column] @ flat[:column]).reshape(shape)
        error[column] = values - nearest(column, wanted)
    return error


def round_by_panels(source: np.ndarray, factor: Factor, nearest: Nearest) -> np.ndarray:
    """Round the columns of a whole matrix in turn, with one matrix product for each panel of them.

    Args:
        source: Weights in the factor's order, float32 [columns, rows].
        factor: The Hessian.
        nearest: Rounds by the place in that order.

    Returns:
        `source - rounded`, float32 [columns, rows].
    """

    def rounded(panel: slice, target: np.ndarray) -> np.ndarray:
        unit = factor.unit[panel, panel]
        return target - round_columns(target, unit, partial(_from, nearest, panel.start))

    return by_panels(source, factor, rounded)


def by_panels(source: np.ndarray, factor: Factor, rounded: RoundPanel) -> np.ndarray:
    """The same with panels rounded in a way of their own."""
    error = np.zeros_like(source)
    for start in range(0, len(source), PANEL):
        panel = slice(start, start + PANEL)
        error[panel] = source[panel] - rounded(panel, panel_target(source, error, factor, panel))
    return error


def panel_target(source: np.ndarray, error: np.ndarray, factor: Factor, panel: slice) -> np.ndarray:
    """What `round_columns` must be given of a panel so that it makes up for the errors before it.

    Example: four columns in panels of two, U_ij = 1/2 for all i < j, errors (0.4, -0.2) in the first panel.
    These ask (0.4 - 0.2) / 2 = 0.1 of both columns of the second. Its first column is raised by 0.1, but its
    second by 0.05: `round_columns` takes the raise of the first for an error of it and adds half of that.

    Args:
        source: Weights in the factor's order, float32 [columns, rows].
        error: `source - rounded` of the columns before the panel, float32 [columns, rows].
        factor: The Hessian.
        panel: The columns.

    Returns:
        float32 [columns of the panel, rows].
    """
    from fastvlm_convert.quantization.column_passes import solve_in_turn  # Numba; only where it is needed

    before = slice(0, panel.start)
    asked = factor.unit[before, panel].T @ error[before]
    solve_in_turn(np.ascontiguousarray(factor.unit[panel, panel].T), asked)
    return source[panel] + asked


def panel_pull(error: np.ndarray, factor: Factor, panel: slice) -> np.ndarray:
    """How far a rounded panel is from where it would cost least, all other columns being as they are.

    With M the panel's part of the Hessian, a panel q costs `(t - q)^T M (t - q)` and a constant; the pull is
    t - q of the panel as it is rounded now.

    Example: H = [[1, 1/2], [1/2, 1]] and errors (0.4, -0.6). The panel of the first column is pulled by
    0.4 - 0.6 / 2 = 0.1: an error of 0.3 would cost least.

    Args:
        error: Weights minus rounded weights of all columns, float32 [columns, rows].
        factor: The Hessian.
        panel: The columns.

    Returns:
        float32 [columns of the panel, rows].
    """
    matrix = factor.matrix[panel, panel].astype(np.float64)
    return np.linalg.solve(matrix, factor.matrix[panel] @ error).astype(np.float32)


def _from(nearest: Nearest, start: int, place: int, values: np.ndarray) -> np.ndarray:
    """Rounds by the place in a panel."""
    return nearest(start + place, values)
