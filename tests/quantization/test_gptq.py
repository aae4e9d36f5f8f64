"""GPTQ against the search, the textbook, and truths that need no tolerance."""

import numpy as np
import pytest

from fastvlm_convert.errors import RecipeError
from fastvlm_convert.quantization import gptq as gptq_module
from fastvlm_convert.quantization.error_compensation import (
    factorize,
    hessian_of,
    importance_order,
    output_error,
)
from fastvlm_convert.quantization.gptq import gptq
from fastvlm_convert.quantization.search import quantize_affine, round_to_nearest
from fastvlm_convert.quantized.schemes import AffineScheme
from tests.quantization.layers import correlated_hessian, correlated_inputs, textbook_gptq, weights

B32 = AffineScheme(4, 32, symmetric=False)
SCHEMES = [
    AffineScheme(bits, size, symmetric)
    for bits, size in ((4, 16), (4, 32), (4, 64), (4, 128), (4, None), (8, 32), (8, None))
    for symmetric in (True, False)
]


def test_no_worse_than_the_textbook() -> None:
    ratios = []
    for seed in range(4):
        weight, hessian = weights(seed), correlated_hessian(seed)
        ours = output_error(weight, gptq(weight, hessian, B32).dequantized(), hessian)
        ratios.append(ours / output_error(weight, textbook_gptq(weight, hessian, B32), hessian))
    assert max(ratios) < 1.02
    assert np.mean(ratios) < 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_beats_search(scheme: AffineScheme) -> None:
    for seed in range(2):
        weight, hessian = weights(seed, 8, 128), correlated_hessian(seed, 128)
        ours = output_error(weight, gptq(weight, hessian, scheme).dequantized(), hessian)
        searched = quantize_affine(weight, scheme, np.diag(hessian).astype(np.float32))
        assert ours < 0.6 * output_error(weight, searched.dequantized(), hessian)
        assert ours < 0.6 * output_error(weight, round_to_nearest(weight, scheme).dequantized(), hessian)


def test_on_inputs_not_seen() -> None:
    weight, inputs = weights(5), correlated_inputs(5, tokens=4000)
    seen, unseen = hessian_of(inputs[::2]), hessian_of(inputs[1::2])
    ours = output_error(weight, gptq(weight, seen, B32).dequantized(), unseen)
    assert ours < output_error(weight, textbook_gptq(weight, seen, B32), unseen)


def test_factor() -> None:
    hessian = correlated_hessian(0, 64)
    order = importance_order(np.diag(hessian), 16)
    assert sorted(order) == list(range(64))
    assert all(len(set(order[start : start + 16] // 16)) == 1 for start in range(0, 64, 16))
    factor = factorize(hessian, order, 0.01)
    wanted = hessian[np.ix_(order, order)] / np.diag(hessian).mean() + 0.01 * np.eye(64)
    np.testing.assert_allclose(factor.unit * factor.variance @ factor.unit.T, wanted, atol=1e-5)
    # GPTQ's own factor, of the inverse: its squared diagonal is one over the variance.
    upper = np.linalg.cholesky(np.linalg.inv(wanted)).T
    np.testing.assert_allclose(factor.variance, 1 / np.diag(upper) ** 2, rtol=1e-4)


def test_what_the_scheme_can_hold_stays() -> None:
    rng = np.random.default_rng(0)
    q = rng.integers(0, 16, (8, 128))
    q[:, ::32], q[:, 1::32] = 0, 15
    scale = rng.uniform(0.01, 0.02, (8, 4)).astype(np.float16).astype(np.float32)
    weight = ((q - 7) * np.repeat(scale, 32, 1)).astype(np.float32)
    matrix = gptq(weight, correlated_hessian(0, 128), B32)
    np.testing.assert_allclose(matrix.dequantized(), weight, atol=2e-5)


def test_dead_columns_and_rank_one() -> None:
    weight, inputs = weights(6), correlated_inputs(6)
    inputs[:, 10:50] = 0
    matrix = gptq(weight, hessian_of(inputs), B32)
    assert np.isfinite(matrix.dequantized()).all()
    assert np.abs(matrix.dequantized() - weight)[:, 10:50].max() < np.abs(weight).max()
    one = np.ones((1, 256), np.float32)
    bare = gptq(weight, hessian_of(one), B32, damping=0)
    assert np.isfinite(bare.dequantized()).all()
    nothing = gptq(weight, np.zeros((256, 256)), B32).dequantized()
    assert (
        np.square(nothing - weight).sum()
        <= np.square(round_to_nearest(weight, B32).dequantized() - weight).sum()
    )


def test_bad_hessian() -> None:
    with pytest.raises(ValueError, match="not positive"):
        gptq(weights(0, 2, 32), np.eye(32) - 40 * np.ones((32, 32)) + 40 * np.eye(32), B32)
    with pytest.raises(ValueError, match="nan"):
        gptq(weights(0, 2, 32), np.full((32, 32), np.nan), B32)


def test_indivisible() -> None:
    with pytest.raises(RecipeError, match="do not divide"):
        gptq(np.ones((2, 48), np.float32), np.eye(48), B32)


@pytest.mark.parametrize("activation_order", [True, False])
def test_deterministic_and_free_of_scale(activation_order: bool) -> None:
    weight, hessian = weights(7, 8, 128), correlated_hessian(7, 128)
    first = gptq(weight, hessian, B32, activation_order=activation_order)
    for other in (hessian.copy(), hessian * 2.0**20):
        again = gptq(weight, other, B32, activation_order=activation_order)
        for name in ("q", "scale", "zero_point"):
            np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


def test_hessian() -> None:
    inputs = correlated_inputs(0, 32, 5000)
    importance = np.random.default_rng(0).uniform(size=5000).astype(np.float32)
    wanted = (inputs.astype(np.float64).T * importance) @ inputs.astype(np.float64)
    np.testing.assert_allclose(
        hessian_of(inputs, importance), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max()
    )
    np.testing.assert_allclose(hessian_of(inputs), hessian_of(inputs, np.ones(5000, np.float32)), rtol=1e-4)


@pytest.mark.parametrize(("planted", "is_tried"), [(1.0, False), (60.0, True)])
def test_a_wide_matrix_tries_another_order_where_few_columns_dwarf_the_rest(
    planted: float, is_tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq_module, "NARROW", 64)
    inputs = np.random.default_rng(0).standard_normal((2000, 128)).astype(np.float32)
    inputs[:, 5] *= planted
    weight, hessian = weights(0, 8, 128), hessian_of(inputs)
    found = gptq(weight, hessian, B32)
    monkeypatch.setattr(gptq_module, "NARROW", 128)
    tried = gptq(weight, hessian, B32)
    assert output_error(weight, tried.dequantized(), hessian) < 1.02 * output_error(
        weight, found.dequantized(), hessian
    )
    assert np.array_equal(tried.q, found.q) or not is_tried
