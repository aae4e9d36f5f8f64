"""Rounding columns in turn, each after the errors of those before it were added to it; compiled by Numba.

Importing this module loads LLVM: import it late. Rows of the matrix lie along the last axis and are the lanes
of vectors, so that every row is summed column by column, in one order on every processor.
"""

from typing import Final

import numpy as np

from fastvlm_convert.quantization.compiled import compiled

_TOGETHER: Final = 64  # rows whose errors stay in a core's first cache
_UNROLLED: Final = 4  # errors added between two stores
_ZERO: Final = np.float32(0)


@compiled("void(float32[::1], float32[::1], float32[:, ::1], int64, float32[::1])")
def _compensate(
    source: np.ndarray, unit: np.ndarray, error: np.ndarray, columns: int, wanted: np.ndarray
) -> None:
    """What a column should be rounded to, given the errors of those before it.

    Args:
        source: The column, float32 [rows].
        unit: How much it makes up for each of the errors, float32 [columns or more].
        error: Of the columns before, float32 [columns or more, rows or more].
        columns: How many.
        wanted: Overwritten with the column and what the errors ask of it, float32 [rows or more].
    """
    for lane in range(len(source)):
        wanted[lane] = source[lane]
    whole = columns - columns % _UNROLLED
    for k in range(0, whole, _UNROLLED):
        u0, u1, u2, u3 = unit[k], unit[k + 1], unit[k + 2], unit[k + 3]
        e0, e1, e2, e3 = error[k], error[k + 1], error[k + 2], error[k + 3]
        for lane in range(len(source)):
            wanted[lane] = wanted[lane] + u0 * e0[lane] + u1 * e1[lane] + u2 * e2[lane] + u3 * e3[lane]
    for k in range(whole, columns):
        u0, e0 = unit[k], error[k]
        for lane in range(len(source)):
            wanted[lane] += u0 * e0[lane]


@compiled("void(float32[:, ::1], float32[:, ::1], float32[::1], float32[:, :, ::1], float32[:, ::1])")
def sum_costs(
    target: np.ndarray, unit: np.ndarray, variance: np.ndarray, given: np.ndarray, cost: np.ndarray
) -> None:
    """What a panel costs with each of several parameters.

    Args:
        target: What is to be rounded, float32 [columns, rows].
        unit: Unit lower triangular, the transpose of `Factor.unit`; float32 [columns, columns].
        variance: Float32 [columns].
        given: Scale, one by it, and the least and the greatest `q - z` of each try; float32 [4, tries, rows].
        cost: Overwritten; float32 [tries, rows].
    """
    columns, count = target.shape
    error = np.empty((columns, _TOGETHER), np.float32)
    wanted = np.empty(_TOGETHER, np.float32)
    for first in range(0, count, _TOGETHER):
        last = min(first + _TOGETHER, count)
        for number in range(len(cost)):
            step, factor = given[0, number, first:last], given[1, number, first:last]
            least, most = given[2, number, first:last], given[3, number, first:last]
            total = cost[number, first:last]
            for lane in range(last - first):
                total[lane] = _ZERO
            for column in range(columns):
                source = target[column, first:last]
                _compensate(source, unit[column], error, column, wanted)
                weight, left = variance[column], error[column]
                for lane in range(last - first):
                    steps = min(max(np.rint(wanted[lane] * factor[lane]), least[lane]), most[lane])
                    rounded = steps * step[lane]
                    left[lane] = source[lane] - rounded
                    missed = wanted[lane] - rounded
                    total[lane] += weight * (missed * missed)


@compiled("void(float32[:, ::1], float32[:, ::1], int64[::1], float32[:, :, ::1], float32[:, ::1])")
def round_in_turn(
    target: np.ndarray, unit: np.ndarray, block: np.ndarray, given: np.ndarray, steps: np.ndarray
) -> None:
    """Round a panel.

    Args:
        target: What is to be rounded, float32 [columns, rows].
        unit: Unit lower triangular, the transpose of `Factor.unit`; float32 [columns, columns].
        block: The parameters that each column takes, int64 [columns].
        given: Scale, one by it, and the least and the greatest `q - z`; float32 [4, parameters, rows].
        steps: Overwritten with `q - z`; float32 like `target`.
    """
    columns, count = target.shape
    error = np.empty((columns, _TOGETHER), np.float32)
    wanted = np.empty(_TOGETHER, np.float32)
    for first in range(0, count, _TOGETHER):
        last = min(first + _TOGETHER, count)
        for column in range(columns):
            number = block[column]
            step, factor = given[0, number, first:last], given[1, number, first:last]
            least, most = given[2, number, first:last], given[3, number, first:last]
            source, whole = target[column, first:last], steps[column, first:last]
            _compensate(source, unit[column], error, column, wanted)
            left = error[column]
            for lane in range(last - first):
                whole[lane] = min(max(np.rint(wanted[lane] * factor[lane]), least[lane]), most[lane])
                left[lane] = source[lane] - whole[lane] * step[lane]


@compiled("void(float32[:, ::1], float32[:, ::1])")
def solve_in_turn(unit: np.ndarray, values: np.ndarray) -> None:
    """Solve `unit x = values` by substitution.

    Args:
        unit: Unit lower triangular, float32 [columns, columns].
        values: Overwritten with x; float32 [columns, rows].
    """
    columns, count = values.shape
    for first in range(0, count, _TOGETHER):
        last = min(first + _TOGETHER, count)
        for column in range(columns):
            solved = values[column, first:last]
            for k in range(column):
                factor, before = unit[column, k], values[k, first:last]
                for lane in range(last - first):
                    solved[lane] -= factor * before[lane]
