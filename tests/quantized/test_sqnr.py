from itertools import pairwise

import numpy as np
import pytest

from fastvlm_convert.metrics import sqnr_db
from fastvlm_convert.quantization.search import quantize_affine
from fastvlm_convert.quantized import weight as module
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme, PaletteMatrix, PaletteScheme
from fastvlm_convert.quantized.sqnr import ErrorMeter
from fastvlm_convert.quantized.weight import PaletteWeight, QuantizedWeight
from fastvlm_convert.weights.source import computed

RNG = np.random.default_rng(5)
FLOATS = RNG.standard_normal((37, 32)).astype(np.float32)
SCHEME = AffineScheme(4, 16, False)
MATRIX = quantize_affine(FLOATS, SCHEME)
PALETTE = PaletteMatrix(
    PaletteScheme(4, 8, True),
    RNG.integers(0, 16, (37, 32), np.uint8),
    RNG.standard_normal((5, 16)).astype(np.float16),
    RNG.random(37).astype(np.float16),
)


def read(start, stop):
    return AffineMatrix(SCHEME, MATRIX.q[start:stop], MATRIX.scale[start:stop], MATRIX.zero_point[start:stop])


def measured():
    floats = {name: computed(FLOATS.shape, "float32", lambda: FLOATS) for name in ("a", "p", "norm")}
    meter = ErrorMeter(floats)
    weights = {
        "a": QuantizedWeight((37, 32, 1, 1), SCHEME, read),
        "p": PaletteWeight((37, 32), PALETTE.scheme, PALETTE.read),
        "norm": floats["norm"],
    }
    return meter, weights, meter.view(weights)


@pytest.mark.parametrize("steps", [(0, 37), (0, 1, 2, 37), (0, 20, 37), range(38)])
def test_the_sums_do_not_depend_on_how_rows_are_read(steps):
    meter, _, view = measured()
    for start, stop in reversed(list(pairwise(steps))):
        view["a"].read(start, stop)
    sums = meter.sums("a")
    whole, _, again = measured()
    again["a"].read(0, 37)
    assert sums == whole.sums("a")
    assert sums.sqnr_db == pytest.approx(sqnr_db(FLOATS, MATRIX.dequantized()), abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 4 * 32 * 8, 4 * 32 * 20, 1 << 20])
def test_palettes_are_measured_group_by_group(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    meter, _, view = measured()
    np.testing.assert_array_equal(view["p"].matrix().indices, PALETTE.indices)
    assert meter.sums("p").sqnr_db == pytest.approx(sqnr_db(FLOATS, PALETTE.dequantized()), abs=1e-5)


def test_the_weights_are_the_same_and_measured_once():
    meter, weights, view = measured()
    assert view["norm"] is weights["norm"]
    assert view["a"].shape == (37, 32, 1, 1)
    first = view["a"].read(0, 37)
    np.testing.assert_array_equal(first.q, MATRIX.q)
    sums = meter.sums("a")
    view["a"].read(3, 9)
    assert meter.sums("a") == sums


def test_a_weight_that_was_not_read_whole_has_no_sums():
    meter, _, view = measured()
    view["a"].read(0, 36)
    with pytest.raises(AssertionError, match="'a' was not read whole"):
        meter.sums("a")
