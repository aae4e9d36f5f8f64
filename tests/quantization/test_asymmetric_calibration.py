"""What a layer is aimed at, against numpy's least squares."""

import numpy as np
import pytest

from fastvlm_convert.quantization import asymmetric_calibration
from fastvlm_convert.quantization.asymmetric_calibration import (
    Drift,
    Moments,
    corrected_bias,
    moments_of,
    target_weight,
)
from tests.quantization.layers import correlated_inputs, weights

RNG = np.random.default_rng(0)
COLUMNS, TOKENS = 32, 3000
INPUTS = correlated_inputs(3, COLUMNS, TOKENS)
REFERENCE = (INPUTS @ (np.eye(COLUMNS) + 0.05 * RNG.standard_normal((COLUMNS, COLUMNS))) + 0.1).astype(
    np.float32
)
IMPORTANCE = RNG.gamma(0.5, size=TOKENS).astype(np.float32)
WEIGHT = weights(2, 8, COLUMNS)
DRIFT = (
    INPUTS @ RNG.standard_normal((COLUMNS, 8)) * 0.02 + 0.1 * RNG.standard_normal((TOKENS, 8)) + 0.3
).astype(np.float32)


def arrays(moments: Moments) -> dict[str, np.ndarray]:
    """All sums by name."""
    assert isinstance(moments.drift, Drift)
    found = {**vars(moments), **{f"drift.{name}": value for name, value in vars(moments.drift).items()}}
    del found["drift"]
    return {name: np.asarray(value) for name, value in found.items()}


def error(weight: np.ndarray, drift: np.ndarray | float = 0.0) -> float:
    """Weighted squared error of the outputs, of the residual stream where that has drifted."""
    misses = REFERENCE.astype(np.float64) @ WEIGHT.T + drift - INPUTS.astype(np.float64) @ weight.T
    return float((IMPORTANCE[:, None] * misses**2).sum())


def least_squares(ridge: float, drift: np.ndarray | float = 0.0) -> np.ndarray:
    """The minimizer of that error plus a ridge on the change, by numpy."""
    root = np.sqrt(IMPORTANCE.astype(np.float64))[:, None]
    x, y = root * REFERENCE, root * INPUTS
    penalty = np.sqrt(ridge * np.square(y).sum() / COLUMNS) * np.eye(COLUMNS)
    wanted = np.concatenate([(x - y) @ WEIGHT.T + root * drift, np.zeros((COLUMNS, len(WEIGHT)))])
    return WEIGHT + np.linalg.lstsq(np.concatenate([y, penalty]), wanted, rcond=None)[0].T


@pytest.mark.parametrize("ridge", [1e-9, 0.1])
def test_it_is_the_least_squares_solution(monkeypatch, ridge):
    monkeypatch.setattr(asymmetric_calibration, "RIDGE", ridge)
    found = target_weight(WEIGHT, moments_of(REFERENCE, INPUTS, IMPORTANCE))
    np.testing.assert_allclose(found, least_squares(ridge), rtol=1e-3, atol=1e-4)
    assert error(found) < 0.9 * error(WEIGHT)
    assert found.dtype == np.float32


def test_it_makes_up_for_the_drift_of_the_stream(monkeypatch):
    monkeypatch.setattr(asymmetric_calibration, "RIDGE", 1e-9)
    found = target_weight(WEIGHT, moments_of(REFERENCE, INPUTS, IMPORTANCE, DRIFT))
    np.testing.assert_allclose(found, least_squares(1e-9, DRIFT), rtol=1e-3, atol=1e-3)
    blind = target_weight(WEIGHT, moments_of(REFERENCE, INPUTS, IMPORTANCE))
    assert error(found, DRIFT) < 0.9 * error(blind, DRIFT)


def test_nothing_to_make_up_for():
    np.testing.assert_array_equal(target_weight(WEIGHT, moments_of(INPUTS, INPUTS, IMPORTANCE)), WEIGHT)
    np.testing.assert_array_equal(target_weight(WEIGHT, moments_of(REFERENCE, 0 * INPUTS, None)), WEIGHT)


@pytest.mark.parametrize("drift", [None, DRIFT])
@pytest.mark.parametrize("importance", [IMPORTANCE, None])
def test_the_bias_makes_the_means_equal(importance, drift):
    bias, rounded = RNG.standard_normal(8).astype(np.float32), np.round(WEIGHT, 2)
    moments = moments_of(REFERENCE, INPUTS, importance, drift)
    shifted = corrected_bias(bias, WEIGHT, rounded, moments)
    wanted = REFERENCE @ WEIGHT.T + bias + (0 if drift is None else drift)
    expected = np.average(wanted, 0, importance)
    np.testing.assert_allclose(np.average(INPUTS @ rounded.T + shifted, 0, importance), expected, atol=1e-4)
    assert np.abs(np.average(INPUTS @ rounded.T + bias, 0, importance) - expected).max() > 1e-2


def test_sums():
    x, y, w = (part.astype(np.float64) for part in (REFERENCE, INPUTS, IMPORTANCE))
    moments = moments_of(REFERENCE, INPUTS, IMPORTANCE, DRIFT)
    close = {"rtol": 1e-3, "atol": 1e-3 * float(np.abs(moments.hessian).max())}
    np.testing.assert_allclose(moments.hessian, (y.T * w) @ y, **close)
    np.testing.assert_allclose(moments.cross, ((x - y).T * w) @ y, **close)
    np.testing.assert_allclose(moments.reference, np.average(x, 0, w), atol=1e-4)
    np.testing.assert_allclose(moments.mean, np.average(y, 0, w), atol=1e-4)
    assert moments.drift is not None
    np.testing.assert_allclose(moments.drift.cross, (DRIFT.astype(np.float64).T * w) @ y, **close)
    np.testing.assert_allclose(moments.drift.mean, np.average(DRIFT, 0, w), atol=1e-4)


def test_tokens_without_weight_do_not_count():
    kept, importance = np.arange(TOKENS) % 3 != 0, IMPORTANCE.copy()
    importance[~kept] = 0
    some = arrays(moments_of(REFERENCE[kept], INPUTS[kept], IMPORTANCE[kept], DRIFT[kept]))
    masked = arrays(moments_of(REFERENCE, INPUTS, importance, DRIFT))
    for name, value in masked.items():
        np.testing.assert_allclose(value, some[name], rtol=1e-3, atol=0.1)
    nothing = arrays(moments_of(REFERENCE, INPUTS, np.zeros(TOKENS, np.float32), DRIFT))
    assert not any(value.any() for value in nothing.values())


def test_inputs_behind_scales():
    scales = np.exp2(RNG.integers(-2, 3, COLUMNS)).astype(np.float32)
    divided = arrays(moments_of(REFERENCE / scales, INPUTS / scales, IMPORTANCE, DRIFT))
    found = arrays(moments_of(REFERENCE, INPUTS, IMPORTANCE, DRIFT).scaled(scales))
    for name, value in found.items():
        np.testing.assert_allclose(value, divided[name], rtol=1e-3, atol=1e-2)
