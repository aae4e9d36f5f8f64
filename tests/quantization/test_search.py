"""Scale search against enumeration, and its edge cases."""

import tracemalloc

import numpy as np
import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.quantization.search import quantize_affine, round_to_nearest
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme
from tests.planted import DEMO
from tests.quantization.exhaustive_search import exhaustive
from tests.quantization.layers import weights

SCHEMES = [
    AffineScheme(bits, size, symmetric)
    for bits in (4, 8)
    for size in (16, 32, 64, 128, None)
    for symmetric in (True, False)
]
FOUR_BIT = [scheme for scheme in SCHEMES if scheme.bits == 4]
SHIPPED = [scheme for scheme in SCHEMES if scheme.block_size != 16]
DEMO_LAYERS = ("mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj", "self_attn.v_proj")


def block_errors(
    weight: np.ndarray, matrix: AffineMatrix, importance: np.ndarray | None = None
) -> np.ndarray:
    """Squared error of every block, float64 [rows, blocks]."""
    error = np.square(weight.astype(np.float64) - matrix.dequantized())
    if importance is not None:
        error *= importance
    return error.reshape(*matrix.scale.shape, -1).sum(-1)


def least_errors(weight: np.ndarray, scheme: AffineScheme) -> np.ndarray:
    """The least error of every block over float16 scales, densely enumerated, and all zero points."""
    blocks = weight.astype(np.float64).reshape(len(weight), scheme.num_blocks(weight.shape[1]), -1)
    extent = (
        np.abs(blocks).max(-1) if scheme.symmetric else np.ptp(np.append(blocks, 0 * blocks[..., :1], -1), -1)
    )
    signs, zeros = ((1, -1), (scheme.middle,)) if scheme.symmetric else ((1,), range(scheme.levels))
    full = extent / (scheme.middle if scheme.symmetric else scheme.levels - 1)
    least = np.full(full.shape, np.inf)
    for factor in np.linspace(0.8, 2.5, 800):
        for sign in signs:
            scale = (sign * full / factor).astype(np.float16).astype(np.float64)[..., None]
            steps = np.rint(blocks / scale)
            for zero in zeros:
                error = blocks - np.clip(steps, -zero, scheme.levels - 1 - zero) * scale
                least = np.minimum(least, np.square(error).sum(-1))
    return least


@pytest.mark.parametrize("scheme", FOUR_BIT, ids=str)
def test_close_to_the_best_there_is(scheme: AffineScheme) -> None:
    weight = weights(0, 8, 128)
    found, least = block_errors(weight, quantize_affine(weight, scheme)), least_errors(weight, scheme)
    assert found.sum() <= 1.02 * least.sum()
    assert np.median(found / least) <= 1.015


@pytest.fixture(scope="module")
def layers() -> list[np.ndarray]:
    """Random weights, and trained ones of the demo's decoder; float32 [rows, columns]."""
    demo = open_checkpoint(DEMO).weights
    trained = [demo[f"decoder.layers.1.{name}.weight"].array() for name in DEMO_LAYERS]
    gaussian = np.random.default_rng(0).standard_normal((128, 896)).astype(np.float32)
    return [weights(5, 128, 256), gaussian, *trained]


@pytest.mark.parametrize("scheme", SHIPPED, ids=str)
def test_as_good_as_the_whole_grid(scheme: AffineScheme, layers: list[np.ndarray]) -> None:
    for weight in layers:
        importance = np.random.default_rng(1).gamma(0.5, size=weight.shape[1]).astype(np.float32)
        for given in (None, importance):
            found = block_errors(weight, quantize_affine(weight, scheme, given), given).sum()
            assert found <= 1.01 * block_errors(weight, exhaustive(weight, scheme, given), given).sum()


@pytest.mark.parametrize("scheme", [AffineScheme(4, 64, False), AffineScheme(8, None, True)], ids=str)
def test_threads_change_nothing(scheme: AffineScheme, monkeypatch) -> None:
    weight = weights(6, 700, 512)
    importance = np.random.default_rng(6).gamma(0.5, size=512).astype(np.float32)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = quantize_affine(weight, scheme, importance)
    for threads in ("2", "3", "4"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        several = quantize_affine(weight, scheme, importance)
        for name in ("q", "scale", "zero_point"):
            np.testing.assert_array_equal(getattr(several, name), getattr(one, name))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_never_worse_than_rounding(scheme: AffineScheme) -> None:
    for seed in range(3):
        weight = weights(seed, 16, 128)
        importance = np.random.default_rng(seed).gamma(0.5, size=128).astype(np.float32)
        for given in (None, importance):
            plain = block_errors(weight, round_to_nearest(weight, scheme), given)
            found = block_errors(weight, quantize_affine(weight, scheme, given), given)
            assert np.all(found <= plain * (1 + 1e-4))


def test_importance_is_used() -> None:
    weight, scheme = weights(1), AffineScheme(4, 32, symmetric=False)
    importance = np.random.default_rng(1).gamma(0.3, size=256).astype(np.float32)
    blind = block_errors(weight, quantize_affine(weight, scheme), importance).sum()
    assert block_errors(weight, quantize_affine(weight, scheme, importance), importance).sum() < 0.9 * blind
    zero = quantize_affine(weight, scheme, np.zeros(256, np.float32))
    np.testing.assert_array_equal(zero.q, quantize_affine(weight, scheme, np.ones(256, np.float32)).q)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("quantize", [quantize_affine, round_to_nearest])
def test_hard_blocks(scheme: AffineScheme, quantize) -> None:
    columns = 128
    rng = np.random.default_rng(0)
    hard = np.stack(
        [
            np.zeros(columns),
            np.full(columns, 0.3),
            np.full(columns, -0.3),
            rng.standard_normal(columns) * 1e-7,  # a scale among float16's subnormals
            rng.standard_normal(columns) * 1e-12,
            np.where(np.arange(columns) == 5, 1e3, 1e-3 * rng.standard_normal(columns)),
            np.where(np.arange(columns) == 5, -1e7, 1.0),  # beyond any float16 scale
        ]
    ).astype(np.float32)
    matrix = quantize(hard, scheme)
    values = matrix.dequantized()
    assert np.isfinite(values).all()
    assert matrix.q.max() < scheme.levels
    assert (matrix.scale != 0).all()
    assert not values[0].any()
    np.testing.assert_allclose(values[1:3], hard[1:3], rtol=2**-8 if scheme.bits == 8 else 0.07)
    assert np.abs(values[3:5] - hard[3:5]).max() <= 2**-24
    assert values[6, 5] < -8e5 / 2
    if scheme.symmetric:
        assert (matrix.zero_point == scheme.middle).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_whose_squares_overflow_have_scales(scheme: AffineScheme) -> None:
    assert np.isfinite(quantize_affine(weights(4, 5, 128) * np.float32(1e30), scheme).scale).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_stored(scheme: AffineScheme) -> None:
    weight = weights(3, 5, 128)
    matrix = quantize_affine(weight, scheme)
    blocks = scheme.num_blocks(128)
    assert (matrix.q.dtype, matrix.q.shape) == (np.uint8, (5, 128))
    assert (matrix.scale.dtype, matrix.scale.shape) == (np.float16, (5, blocks))
    assert (matrix.zero_point.dtype, matrix.zero_point.shape) == (np.uint8, (5, blocks))
    again = quantize_affine(weight, scheme)
    for name in ("q", "scale", "zero_point"):
        np.testing.assert_array_equal(getattr(matrix, name), getattr(again, name))


def test_indivisible() -> None:
    with pytest.raises(RecipeError, match="blocks of 32 do not divide the 100 columns"):
        quantize_affine(np.ones((2, 100), np.float32), AffineScheme(4, 32, symmetric=True))


def test_memory_stays_small() -> None:
    weight = weights(0, 4096, 896)
    scheme = AffineScheme(8, 128, symmetric=True)
    tracemalloc.start()
    matrix = quantize_affine(weight, scheme)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < matrix.q.nbytes + matrix.scale.nbytes + matrix.zero_point.nbytes + 8e6
