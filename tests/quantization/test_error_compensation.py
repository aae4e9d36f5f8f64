"""The worked examples of the module, by its own functions and by hand; panels against one panel."""

import numpy as np
import pytest

from fastvlm_convert.quantization import error_compensation
from fastvlm_convert.quantization.error_compensation import (
    Factor,
    block_factor,
    factorize,
    importance_order,
    output_error,
    panel_pull,
    panel_target,
    round_by_panels,
    round_columns,
)
from tests.quantization.layers import correlated_hessian, weights

HALVES = np.array([[1.0, 0.5], [0.5, 1.0]])


def whole(_: int, values: np.ndarray) -> np.ndarray:
    return np.rint(values)


def test_rounding_in_turn_costs_less_than_rounding_to_nearest():
    unit, variance = block_factor(HALVES)
    np.testing.assert_allclose(unit, [[1, 0.5], [0, 1]])
    np.testing.assert_allclose(variance, [0.75, 1])
    weight = np.full((2, 1), 0.4, np.float32)
    rounded = weight - round_columns(weight, unit, whole)
    np.testing.assert_array_equal(rounded, [[0], [1]])
    assert output_error(weight.T, rounded.T, HALVES) == pytest.approx(0.28)
    assert output_error(weight.T, np.zeros((1, 2)), HALVES) == pytest.approx(0.48)


def four_columns() -> Factor:
    unit = np.eye(4, dtype=np.float32)
    unit[np.triu_indices(4, 1)] = 0.5
    return Factor(np.arange(4), unit @ unit.T, unit, np.ones(4, np.float32))


def test_a_panel_is_raised_by_what_is_asked_of_it():
    error = np.array([[0.4], [-0.2], [0], [0]], np.float32)
    target = panel_target(np.zeros((4, 1), np.float32), error, four_columns(), slice(2, 4))
    np.testing.assert_allclose(target, [[0.1], [0.05]], rtol=1e-6)


def test_a_rounded_panel_is_pulled_to_where_it_costs_least():
    factor = Factor(np.arange(2), HALVES.astype(np.float32), *block_factor(HALVES))
    error = np.array([[0.4], [-0.6]], np.float32)
    pull = panel_pull(error, factor, slice(0, 1))
    assert pull.item() == pytest.approx(0.1)
    moved = error.copy()
    moved[0] -= pull[0]
    beside = np.array([[0.01], [0]])
    costs = [(e.T @ HALVES @ e).item() for e in (moved - beside, moved, moved + beside)]
    assert min(costs) == costs[1]


@pytest.mark.parametrize("panel", [1, 32, 100])
def test_panels_only_save_time(monkeypatch, panel):
    weight, hessian = weights(0), correlated_hessian(0)
    factor = factorize(hessian, importance_order(np.diag(hessian), 1), 0.01)
    source = np.ascontiguousarray(weight.T[factor.order])
    step = np.float32(np.abs(weight).max() / 7)
    errors = []
    for size in (len(source), panel):
        monkeypatch.setattr(error_compensation, "PANEL", size)
        errors.append(round_by_panels(source, factor, lambda _, values: np.rint(values / step) * step))
    same = np.mean(np.isclose(*errors, atol=1e-3 * step))
    assert same > 0.99  # a value between two steps may go to either
