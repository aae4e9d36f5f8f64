"""Palettes by clustering, and with error compensation."""

import numpy as np
import pytest

from fastvlm_convert.quantization.error_compensation import output_error
from fastvlm_convert.quantization.palettes import palettize
from fastvlm_convert.quantized.schemes import PaletteMatrix, PaletteScheme
from tests.quantization.layers import correlated_hessian, weights

SCHEMES = [
    PaletteScheme(bits, size, scaled) for bits in (4, 6, 8) for size in (1, 16) for scaled in (False, True)
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("with_hessian", [False, True])
def test_what_is_stored(scheme: PaletteScheme, with_hessian: bool) -> None:
    weight = weights(0, 20, 64)  # the last group of 16 rows has 4
    weight[3] = 0
    hessian = correlated_hessian(0, 64) if with_hessian else None
    matrix = palettize(weight, scheme, hessian=hessian)
    assert (matrix.indices.dtype, matrix.indices.shape) == (np.uint8, weight.shape)
    assert matrix.indices.max() < scheme.levels
    assert (matrix.palette.dtype, matrix.palette.shape) == (
        np.float16,
        (scheme.num_groups(20), scheme.levels),
    )
    assert (matrix.scale is not None) == scheme.per_channel_scale
    assert np.isfinite(matrix.dequantized()).all()
    again = palettize(weight, scheme, hessian=hessian)
    np.testing.assert_array_equal(matrix.indices, again.indices)
    np.testing.assert_array_equal(matrix.palette, again.palette)
    if not with_hessian:  # every index is that of the nearest value
        group = np.arange(20) // scheme.group_size
        scale = 1 if matrix.scale is None else matrix.scale.astype(np.float32)[:, None]
        choices = matrix.palette.astype(np.float32)[group][:, None] * np.expand_dims(scale, -1)
        nearest = np.abs(weight[..., None] - choices).min(-1)
        np.testing.assert_allclose(np.abs(weight - matrix.dequantized()), nearest, atol=1e-7)


def test_few_distinct_values_are_exact() -> None:
    values = np.array([-0.5, -0.125, 0.0, 0.25, 1.0], np.float32)
    weight = values[np.random.default_rng(0).integers(0, 5, (16, 64))]
    matrix = palettize(weight, PaletteScheme(4, 16, per_channel_scale=False))
    np.testing.assert_array_equal(matrix.dequantized(), weight)


@pytest.mark.parametrize("columns", [9, 64, 4864])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_groups_can_be_solved_alone(scheme: PaletteScheme, columns: int) -> None:
    """What lets exporters read a weight piece by piece."""
    weight = weights(columns, 80, columns)
    whole = palettize(weight, scheme)
    pieces = PaletteMatrix.joined(
        [palettize(weight[rows], scheme) for rows in (slice(16), slice(16, 64), slice(64, 80))]
    )
    np.testing.assert_array_equal(pieces.indices, whole.indices)
    np.testing.assert_array_equal(pieces.palette, whole.palette)
    np.testing.assert_array_equal(pieces.dequantized(), whole.dequantized())
    np.testing.assert_array_equal(whole.read(16, 64).dequantized(), whole.dequantized()[16:64])


def test_scales_and_importance_help() -> None:
    weight = weights(2, 32, 256)
    plain = palettize(weight, PaletteScheme(4, 16, per_channel_scale=False))
    scaled = palettize(weight, PaletteScheme(4, 16, per_channel_scale=True))
    assert (
        np.square(scaled.dequantized() - weight).sum() < 0.95 * np.square(plain.dequantized() - weight).sum()
    )
    importance = np.random.default_rng(2).gamma(0.3, size=256).astype(np.float32)
    aware = palettize(weight, scaled.scheme, importance)
    error = [np.square(matrix.dequantized() - weight) @ importance for matrix in (aware, scaled)]
    assert error[0].sum() < 0.95 * error[1].sum()


@pytest.mark.parametrize("scaled", [False, True])
def test_error_compensation(scaled: bool) -> None:
    scheme = PaletteScheme(4, 16, scaled)
    for seed in range(2):
        weight, hessian = weights(seed, 32, 128), correlated_hessian(seed, 128)
        aware = palettize(weight, scheme, np.diag(hessian))
        fed_back = palettize(weight, scheme, hessian=hessian)
        least = output_error(weight, aware.dequantized(), hessian)
        assert output_error(weight, fed_back.dequantized(), hessian) < 0.4 * least
