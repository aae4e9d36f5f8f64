"""What a layer is aimed at, against numpy's least squares."""

import numpy as np
import pytest

from fastvlm_convert.quantization import asymmetric_calibration
from fastvlm_convert.quantization.asymmetric_calibration import (
    Lack,
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
    found = {"hessian": moments.hessian, "mean": moments.mean}
    for place, lack in (("inputs", moments.inputs), ("outputs", moments.outputs)):
        assert isinstance(lack, Lack)
        found |= {f"{place}.{name}": value for name, value in vars(lack).items()}
    return found


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
    found = target_weight(WEIGHT, moments_of(INPUTS, IMPORTANCE, reference=REFERENCE))
    np.testing.assert_allclose(found, least_squares(ridge), rtol=1e-3, atol=1e-4)
    assert error(found) < 0.9 * error(WEIGHT)
    assert found.dtype == np.float32


def test_it_makes_up_for_the_drift_of_the_stream(monkeypatch):
    monkeypatch.setattr(asymmetric_calibration, "RIDGE", 1e-9)
    found = target_weight(WEIGHT, moments_of(INPUTS, IMPORTANCE, reference=REFERENCE, missing=DRIFT))
    np.testing.assert_allclose(found, least_squares(1e-9, DRIFT), rtol=1e-3, atol=1e-3)
    blind = target_weight(WEIGHT, moments_of(INPUTS, IMPORTANCE, reference=REFERENCE))
    assert error(found, DRIFT) < 0.9 * error(blind, DRIFT)


def test_nothing_to_make_up_for():
    np.testing.assert_array_equal(
        target_weight(WEIGHT, moments_of(INPUTS, IMPORTANCE, reference=INPUTS)), WEIGHT
    )
    np.testing.assert_array_equal(
        target_weight(WEIGHT, moments_of(0 * INPUTS, None, reference=REFERENCE)), WEIGHT
    )


@pytest.mark.parametrize("drift", [None, DRIFT])
@pytest.mark.parametrize("importance", [IMPORTANCE, None])
def test_the_bias_makes_the_means_equal(importance, drift):
    bias, rounded = RNG.standard_normal(8).astype(np.float32), np.round(WEIGHT, 2)
    moments = moments_of(INPUTS, importance, reference=REFERENCE, missing=drift)
    shifted = corrected_bias(bias, WEIGHT, rounded, moments)
    wanted = REFERENCE @ WEIGHT.T + bias + (0 if drift is None else drift)
    expected = np.average(wanted, 0, importance)
    np.testing.assert_allclose(np.average(INPUTS @ rounded.T + shifted, 0, importance), expected, atol=1e-4)
    assert np.abs(np.average(INPUTS @ rounded.T + bias, 0, importance) - expected).max() > 1e-2


def test_sums():
    x, y, w = (part.astype(np.float64) for part in (REFERENCE, INPUTS, IMPORTANCE))
    moments = moments_of(INPUTS, IMPORTANCE, reference=REFERENCE, missing=DRIFT)
    close = {"rtol": 1e-3, "atol": 1e-3 * float(np.abs(moments.hessian).max())}
    np.testing.assert_allclose(moments.hessian, (y.T * w) @ y, **close)
    np.testing.assert_allclose(moments.mean, np.average(y, 0, w), atol=1e-4)
    assert moments.inputs is not None
    assert moments.outputs is not None
    np.testing.assert_allclose(moments.inputs.cross, ((x - y).T * w) @ y, **close)
    np.testing.assert_allclose(moments.inputs.mean, np.average(x - y, 0, w), atol=1e-4)
    np.testing.assert_allclose(moments.outputs.cross, (DRIFT.astype(np.float64).T * w) @ y, **close)
    np.testing.assert_allclose(moments.outputs.mean, np.average(DRIFT, 0, w), atol=1e-4)


@pytest.mark.parametrize("drift", [0, DRIFT])
def test_what_outputs_miss_stands_for_what_inputs_do(drift):
    missed = (REFERENCE - INPUTS) @ WEIGHT.T + drift
    known = moments_of(INPUTS, IMPORTANCE, reference=REFERENCE, missing=drift + np.zeros_like(DRIFT))
    told = moments_of(INPUTS, IMPORTANCE, missing=missed)
    np.testing.assert_allclose(target_weight(WEIGHT, told), target_weight(WEIGHT, known), atol=1e-5)
    rounded, bias = np.round(WEIGHT, 2), np.zeros(8, np.float32)
    shifted = [corrected_bias(bias, WEIGHT, rounded, moments) for moments in (told, known)]
    np.testing.assert_allclose(*shifted, atol=1e-4)


def test_tokens_without_weight_do_not_count():
    kept, importance = np.arange(TOKENS) % 3 != 0, IMPORTANCE.copy()
    importance[~kept] = 0
    some = arrays(moments_of(INPUTS[kept], IMPORTANCE[kept], reference=REFERENCE[kept], missing=DRIFT[kept]))
    masked = arrays(moments_of(INPUTS, importance, reference=REFERENCE, missing=DRIFT))
    for name, value in masked.items():
        np.testing.assert_allclose(value, some[name], rtol=1e-3, atol=0.1)
    nothing = arrays(moments_of(INPUTS, np.zeros(TOKENS, np.float32), reference=REFERENCE, missing=DRIFT))
    assert not any(value.any() for value in nothing.values())


def test_inputs_behind_scales():
    scales = np.exp2(RNG.integers(-2, 3, COLUMNS)).astype(np.float32)
    divided = arrays(moments_of(INPUTS / scales, IMPORTANCE, reference=REFERENCE / scales, missing=DRIFT))
    found = arrays(moments_of(INPUTS, IMPORTANCE, reference=REFERENCE, missing=DRIFT).scaled(scales))
    for name, value in found.items():
        np.testing.assert_allclose(value, divided[name], rtol=1e-3, atol=1e-2)
