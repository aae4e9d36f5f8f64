import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from fastvlm_convert.metrics import (
    cosine_similarity,
    kl_divergence,
    max_abs_error,
    psnr_db,
    sqnr_db,
    top1_agreement,
)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(7, 50)).astype(np.float32) * 4
    return reference, (reference + rng.normal(size=reference.shape) * 0.1).astype(np.float32)


def test_sqnr(pair):
    reference, candidate = (a.astype(np.float64) for a in pair)
    expected = 10 * math.log10((reference**2).sum() / ((reference - candidate) ** 2).sum())
    assert sqnr_db(*pair) == pytest.approx(expected, rel=1e-9)
    assert sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 4.05])) == pytest.approx(40)


def test_psnr_has_the_references_largest_magnitude_as_peak(pair):
    reference, candidate = (a.astype(np.float64) for a in pair)
    mse = ((reference - candidate) ** 2).mean()
    assert psnr_db(*pair) == pytest.approx(10 * math.log10(abs(reference).max() ** 2 / mse), rel=1e-9)
    assert psnr_db(np.array([-10.0, 0.0]), np.array([-10.0, 0.1])) == pytest.approx(43.0103, rel=1e-5)


def test_equal_arrays_have_no_number_but_none(pair):
    assert sqnr_db(pair[0], pair[0].copy()) is None
    assert psnr_db(pair[0], pair[0].copy()) is None
    assert max_abs_error(pair[0], pair[0].copy()) == 0
    assert top1_agreement(pair[0], pair[0].copy()) == 1
    assert (kl_divergence(pair[0], pair[0].copy()) == 0).all()


def test_a_reference_of_zeros_is_very_far_but_not_infinitely():
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    for metric in (sqnr_db, psnr_db):
        for dtype in (np.float32, np.float16):
            assert -math.inf < metric(zeros.astype(dtype), ones.astype(dtype)) < -1000


def test_nan_is_never_a_good_number(pair):
    broken = pair[1].copy()
    broken[2, 3] = np.nan
    for metric in (sqnr_db, psnr_db, max_abs_error, cosine_similarity):
        assert math.isnan(metric(pair[0], broken))
    assert np.isnan(kl_divergence(pair[0], broken)[2])


def test_max_abs_error(pair):
    expected = (torch.from_numpy(pair[0]).double() - torch.from_numpy(pair[1]).double()).abs().max()
    assert max_abs_error(*pair) == expected.item()
    # In float32 this difference would round to 0.
    assert max_abs_error(np.array([2**24], np.int64), np.array([2**24 + 1], np.int64)) == 1
    assert max_abs_error(np.array([], np.float32), np.array([], np.float32)) == 0


def test_differences_are_not_taken_in_the_arrays_own_type():
    a, b = np.array([200, 3], np.uint8), np.array([201, 1], np.uint8)
    assert max_abs_error(a, b) == 2
    assert psnr_db(a, b) == pytest.approx(20 * math.log10(200) - 10 * math.log10(2.5))
    half = np.array([6e4, 6e4], np.float16)
    assert sqnr_db(half, -half) == pytest.approx(20 * math.log10(0.5))


def test_cosine_similarity(pair):
    expected = functional.cosine_similarity(*(torch.from_numpy(a).double().flatten() for a in pair), dim=0)
    assert cosine_similarity(*pair) == pytest.approx(expected.item(), rel=1e-12)
    assert cosine_similarity(np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]])) == 0
    assert cosine_similarity(np.array([1.0, 2.0]), np.array([-2.0, -4.0])) == pytest.approx(-1)


def test_kl_divergence(pair):
    reference, candidate = (torch.from_numpy(a).double().log_softmax(-1) for a in pair)
    expected = functional.kl_div(candidate, reference, reduction="none", log_target=True).sum(-1)
    found = kl_divergence(*pair)
    assert found.shape == (7,)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9)
    assert not np.allclose(found, kl_divergence(pair[1], pair[0]))  # it has a direction
    coin = kl_divergence(np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]]))
    assert coin[0] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))


def test_kl_divergence_of_large_and_shifted_logits(pair):
    large = np.array([[1e4, -1e4, 0.0]], np.float32)
    assert kl_divergence(large, large + 1000)[0] == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(kl_divergence(pair[0] + 500, pair[1] - 500), kl_divergence(*pair), rtol=1e-3)
    assert (kl_divergence(pair[0], pair[0] + np.float32(1e-7)) >= 0).all()


def test_top1_agreement():
    reference = np.array([[0, 1, 2], [5, 1, 2], [0, 9, 2], [1, 1, 0]], np.float32)
    candidate = np.array([[9, 1, 2], [5, 1, 2], [0, 3, 2], [0, 1, 0]], np.float32)
    assert top1_agreement(reference, candidate) == 0.5  # rows 1 and 2; of equals the first counts
