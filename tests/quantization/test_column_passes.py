"""Rounding columns in turn, compiled, against the same in NumPy."""

import numpy as np
import pytest

from fastvlm_convert.quantization.column_passes import round_in_turn, solve_in_turn, sum_costs
from fastvlm_convert.quantization.error_compensation import round_columns


def triangle(columns: int, seed: int) -> np.ndarray:
    """Unit lower triangular, float32 [columns, columns]."""
    random = np.random.default_rng(seed).standard_normal((columns, columns)) / columns
    return (np.tril(random, -1) + np.eye(columns)).astype(np.float32)


def parameters(tries: int, rows: int, seed: int) -> np.ndarray:
    """Scale, one by it, and the least and the greatest `q - z`; float32 [4, tries, rows]."""
    rng = np.random.default_rng(seed)
    scale = (0.02 * rng.uniform(0.5, 2, (tries, rows)) * rng.choice([-1, 1], (tries, rows))).astype(
        np.float32
    )
    zero = rng.integers(0, 16, scale.shape).astype(np.float32)
    return np.stack([scale, np.reciprocal(scale), -zero, np.float32(15) - zero])


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (7, 65), (32, 64), (64, 300), (128, 3)])
def test_columns_make_up_for_those_before_them(columns: int, rows: int) -> None:
    rng = np.random.default_rng(rows)
    target = (0.1 * rng.standard_normal((columns, rows))).astype(np.float32)
    unit, variance = triangle(columns, rows), rng.gamma(2, size=columns).astype(np.float32)
    scale, inverse, low, high = given = parameters(4, rows, columns)
    block = rng.integers(0, 4, columns)

    steps = np.empty_like(target)
    round_in_turn(target, unit, block, given, steps)

    def nearest(column: int, values: np.ndarray) -> np.ndarray:
        n = block[column]
        return np.clip(np.rint(values * inverse[n]), low[n], high[n]) * scale[n]

    error = round_columns(target, np.ascontiguousarray(unit.T), nearest)
    found = target - steps * scale[block]
    is_equal = np.abs(found - error).max(0) < 1e-6  # where no sum lies between two steps
    assert is_equal.mean() > 0.98

    cost = np.empty_like(scale)
    sum_costs(target, unit, variance, given, cost)
    for number in range(4):
        round_in_turn(target, unit, np.full(columns, number), given, steps)
        left = unit @ (target - steps * scale[number])
        np.testing.assert_allclose(cost[number], variance @ np.square(left), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (5, 70), (64, 128), (128, 300)])
def test_substitution(columns: int, rows: int) -> None:
    values = np.random.default_rng(columns).standard_normal((columns, rows)).astype(np.float32)
    unit, found = triangle(columns, rows), values.copy()
    solve_in_turn(unit, found)
    np.testing.assert_allclose(unit @ found, values, rtol=1e-4, atol=1e-4)
