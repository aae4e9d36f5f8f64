"""`device` shows what float16 does on a phone; `exact` what the program means."""

import math

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813

from fastvlm_convert.mil import Interpreter
from tests.mil.programs import write_package

F16 = np.float16
WIDTH = 896
EPS = 1e-6
ROWS = np.zeros((4, WIDTH), F16)


def naive_norm(x):
    mean = mb.reduce_mean(x=mb.mul(x=x, y=x, name="square"), axes=[-1], keep_dims=True)
    return mb.mul(x=x, y=mb.rsqrt(x=mean, epsilon=F16(EPS)))


def safe_norm(x):
    """What our packages hold: no square exceeds 1, whatever x is."""
    m = mb.maximum(x=mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True), y=F16(1e-3))
    y = mb.real_div(x=x, y=m)
    e = mb.real_div(x=F16(math.sqrt(EPS)), y=m)
    v = mb.add(x=mb.reduce_mean(x=mb.mul(x=y, y=y), axes=[-1], keep_dims=True), y=mb.mul(x=e, y=e))
    return mb.mul(x=y, y=mb.rsqrt(x=v, epsilon=F16(0)))


HEADS = np.zeros((1, 2, 4, 64), F16)
FUNCTIONS = {
    "square": (lambda x: mb.mul(x=x, y=x, name="square"), (np.zeros(3, F16),)),
    "naive": (naive_norm, (ROWS,)),
    "safe": (safe_norm, (ROWS,)),
    "softmax": (lambda x: mb.softmax(x=x, axis=-1), (ROWS,)),
    "attention": (
        lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v, name="attended"),
        (HEADS, HEADS, HEADS),
    ),
    "layer_norm": (lambda x: mb.layer_norm(x=x, axes=[-1], epsilon=F16(1e-5), name="normed"), (ROWS,)),
    "mean": (lambda x: mb.reduce_mean(x=x, axes=[-1], name="mean"), (ROWS,)),
    "half_up": (lambda x: mb.add(x=x, y=F16(1)), (np.zeros(3, F16),)),
    "island": (
        lambda x: mb.cast(
            x=mb.rsqrt(x=mb.square(x=mb.cast(x=x, dtype="fp32")), epsilon=np.float32(0)), dtype="fp16"
        ),
        (np.zeros(3, F16),),
    ),
    "cast_down": (lambda x: mb.cast(x=x, dtype="fp16", name="down"), (np.zeros(3, np.float32),)),
    "log_zero": (
        lambda x: mb.exp(x=mb.log(x=mb.relu(x=x), epsilon=F16(0), name="logged")),
        (np.zeros(3, F16),),
    ),
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return write_package(FUNCTIONS, tmp_path_factory.mktemp("precision") / "m.mlpackage")


@pytest.fixture(scope="module")
def device(package):
    return Interpreter(package, "device")


@pytest.fixture(scope="module")
def exact(package):
    return Interpreter(package, "exact")


def run(interpreter, function, *inputs):
    names = [spec.name for spec in interpreter.functions[function].inputs]
    (found,) = interpreter.predict(dict(zip(names, inputs, strict=True)), function=function).values()
    return found


def rms(x):
    wide = torch.from_numpy(x.astype(np.float64))
    return torch.nn.functional.rms_norm(wide, (x.shape[-1],), eps=EPS).numpy()


def test_squares_overflow(device, exact):
    x = np.array([2, 300, -300], np.float32)
    assert run(device, "square", x).tolist() == [4, math.inf, math.inf]
    (found,) = device.nonfinite
    assert (found.function, found.name, found.type, found.kind, found.count) == (
        "square",
        "square",
        "mul",
        "inf",
        2,
    )
    assert run(exact, "square", x).tolist() == [4, 90000, 90000]
    assert not exact.nonfinite


def test_results_are_rounded(device, exact):
    x = np.array([1, 2048, 4096], np.float32)
    assert run(device, "half_up", x).tolist() == [2, 2048, 4096]
    assert run(exact, "half_up", x).tolist() == [2, 2049, 4097]
    np.testing.assert_array_equal(run(device, "half_up", np.full(3, 1 / 3)), F16(F16(1 / 3) + F16(1)))


def test_naive_norm_overflows(device, exact):
    big = np.full((4, WIDTH), 2000, np.float32)
    assert not np.abs(run(device, "naive", big) - rms(big)).max() < 0.5
    assert device.nonfinite[0].name == "square"
    assert np.abs(run(exact, "naive", big) - rms(big)).max() < 1e-4


def test_sums_overflow(device):
    assert np.isinf(run(device, "mean", np.full((4, WIDTH), 100))).all()
    assert device.nonfinite[0].type == "reduce_mean"
    assert run(device, "mean", np.full((4, WIDTH), 50)).tolist() == [50] * 4


def test_safe_norm_does_not_overflow(device):
    rng = np.random.default_rng(0)
    rows = np.stack(
        [
            np.zeros(WIDTH),
            rng.standard_normal(WIDTH) * 2000,
            np.where(np.arange(WIDTH) == 5, 30000, rng.standard_normal(WIDTH)),  # an outlier
            rng.standard_normal(WIDTH) * 1e-3,
        ]
    ).astype(F16)
    found = run(device, "safe", rows)
    assert not device.nonfinite
    wanted = rms(rows)
    assert np.abs(found[0]).max() == 0
    error = np.linalg.norm(found - wanted, axis=-1)[1:] / np.linalg.norm(wanted, axis=-1)[1:]
    assert (error < [2e-3, 2e-3, 3e-2]).all()


def test_softmax_of_large_scores(device, exact):
    """The maximum is subtracted: large scores are fine, infinite ones are not."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4, WIDTH)) * 10000).astype(F16).astype(np.float32)
    found, wanted = run(device, "softmax", x), run(exact, "softmax", x)
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() < 1e-3
    x[0, :2] = math.inf
    assert np.isnan(run(device, "softmax", x)[0]).all()
    assert [(n.type, n.kind) for n in device.nonfinite] == [("softmax", "nan")]


def test_attention_scores_overflow_before_they_are_divided(device, exact):
    q = np.full((1, 2, 4, 64), 40.0)
    v = np.random.default_rng(0).standard_normal((1, 2, 4, 64)).astype(np.float32)
    assert np.isnan(run(device, "attention", q, q, v)).all()  # 64 * 40 * 40 > 65504, and inf - inf is NaN
    assert device.nonfinite[0].name == "attended"
    assert np.isfinite(run(exact, "attention", q, q, v)).all()
    small = np.random.default_rng(1).standard_normal((2, 1, 2, 4, 64))
    found, wanted = (run(i, "attention", *small, v) for i in (device, exact))
    assert 0 < np.abs(found - wanted).max() < 5e-3


def test_layer_norm_overflows_where_its_squares_do(device, exact):
    x = np.random.default_rng(0).standard_normal((4, WIDTH)) * 3
    found, wanted = (run(i, "layer_norm", x) for i in (device, exact))
    assert 0 < np.abs(found - wanted).max() < 2e-2
    x[0] *= 200
    found = run(device, "layer_norm", x)
    assert not np.abs(found[0] - run(exact, "layer_norm", x)[0]).max() < 0.5
    assert np.isfinite(found[1:]).all()


def test_a_float32_island_stays_float32(device):
    assert run(device, "island", np.array([1000, 2000, 300])).tolist() == [F16(1e-3), F16(5e-4), F16(1 / 300)]
    assert not device.nonfinite


def test_a_cast_overflows(device, exact):
    x = np.array([70000, 1, -70000], np.float32)
    assert run(device, "cast_down", x).tolist() == [math.inf, 1, -math.inf]
    assert [(n.name, n.count) for n in device.nonfinite] == [("down", 2)]
    assert run(exact, "cast_down", x).tolist() == x.tolist()


def test_infinity_that_comes_in_is_not_blamed_on_anybody(device):
    run(device, "square", np.array([math.inf, 1, math.nan]))
    assert not device.nonfinite


def test_the_operation_that_made_it_is_named_not_the_one_that_passed_it_on(device):
    assert run(device, "log_zero", np.zeros(3)).tolist() == [0, 0, 0]
    assert [(n.name, n.kind) for n in device.nonfinite] == [("logged", "inf")]
    assert str(device.nonfinite[0]) == "3 x inf first made by 'logged' (log) in 'log_zero'"
