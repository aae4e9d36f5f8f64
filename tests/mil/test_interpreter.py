"""Functions, states, inputs and outputs, and what is reported on the way."""

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import get_new_symbol, types
from PIL import Image

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil import InputError, Interpreter
from fastvlm_convert.mil.ops.table import InPlace
from fastvlm_convert.mil.steps import CallStep
from tests.mil.programs import write_package

CACHE = np.zeros((2, 4, 3), np.float16)
ROW = np.zeros((1, 1, 3), np.float16)
INDEX = np.zeros(1, np.int32)


def put(state, x, index, keep=False):
    """A row of the cache replaced; the sum of the whole cache comes out."""
    before = mb.read_state(input=state)
    begin = mb.concat(values=[[0], index, [0]], axis=0)
    end = mb.concat(values=[[1], mb.add(x=index, y=1), [3]], axis=0)
    now = mb.coreml_update_state(state=state, value=mb.slice_update(x=before, update=x, begin=begin, end=end))
    return mb.reduce_sum(x=now), mb.reduce_sum(x=before) if keep else mb.identity(x=now)


def put_and_view(state, x):
    """A view of the cache is read after the cache was updated."""
    before = mb.read_state(input=state)
    row = mb.squeeze(x=mb.slice_by_size(x=before, begin=[0, 0, 0], size=[1, 1, 3]), axes=[0])
    now = mb.slice_update(x=before, update=x, begin=[0, 0, 0], end=[1, 1, 3])
    now = mb.coreml_update_state(state=state, value=now)
    return mb.reduce_sum(x=now), mb.mul(x=row, y=np.float16(1))


def copy_and_put(a, b, x):
    """One state becomes the other's value, then is updated."""
    now = mb.coreml_update_state(state=a, value=mb.read_state(input=b))
    now = mb.slice_update(x=now, update=x, begin=[0, 0, 0], end=[1, 1, 3])
    return mb.reduce_sum(x=mb.coreml_update_state(state=a, value=now))


@pytest.fixture(scope="module")
def stateful(tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "m.mlpackage"
    specs = (CACHE, ROW, INDEX)
    write_package(
        {
            "decode": (lambda state_c, x, index: put(state_c, x, index), specs),
            "keep": (lambda state_c, x, index: put(state_c, x, index, keep=True), specs),
            "local": (
                lambda state_c, x: mb.reduce_sum(
                    x=mb.slice_update(
                        x=mb.read_state(input=state_c), update=x, begin=[0, 0, 0], end=[1, 1, 3]
                    )
                ),
                (CACHE, ROW),
            ),
            "read": (lambda state_c: mb.identity(x=mb.read_state(input=state_c)), (CACHE,)),
            "add": (
                lambda state_c, x: mb.coreml_update_state(
                    state=state_c, value=mb.add(x=mb.read_state(input=state_c), y=x)
                ),
                (CACHE, ROW),
            ),
            "view": (lambda state_c, x: put_and_view(state_c, x), (CACHE, ROW)),
            "copy": (lambda state_a, state_b, x: copy_and_put(state_a, state_b, x), (CACHE, CACHE, ROW)),
            "stateless": (lambda x: mb.mul(x=x, y=np.float16(2)), (ROW,)),
        },
        path,
    )
    return path


def updates(interpreter, function):
    steps = interpreter._plans[function].block.steps
    return [s.fixed["in_place"] for s in steps if isinstance(s, CallStep) and s.type == "slice_update"]


def test_state_persists_and_is_shared_between_functions(stateful):
    interpreter = Interpreter(stateful)
    state = interpreter.make_state("decode")
    for i in range(3):
        interpreter.predict({"x": np.full((1, 1, 3), i + 1.0), "index": np.array([i])}, state, "decode")
    (held,) = interpreter.predict({}, state, "read").values()
    assert held[0].tolist() == [[1, 1, 1], [2, 2, 2], [3, 3, 3], [0, 0, 0]]
    np.testing.assert_array_equal(state.read_state("state_c"), held)
    assert state.read_state("state_c").dtype == np.float16
    assert updates(interpreter, "decode") == [InPlace.YES]
    state.reset()
    assert not state.read_state("state_c").any()


def test_outputs_are_not_views_of_the_state(stateful):
    interpreter = Interpreter(stateful)
    state = interpreter.make_state("decode")
    first = interpreter.predict({"x": np.ones((1, 1, 3)), "index": np.array([0])}, state, "decode")
    copy = {k: v.copy() for k, v in first.items()}
    interpreter.predict({"x": np.full((1, 1, 3), 9), "index": np.array([0])}, state, "decode")
    for name, value in first.items():
        np.testing.assert_array_equal(value, copy[name])


def test_a_value_that_is_read_later_is_not_overwritten(stateful):
    interpreter = Interpreter(stateful)
    state = interpreter.make_state("keep")
    found = interpreter.predict({"x": np.ones((1, 1, 3)), "index": np.array([0])}, state, "keep")
    assert [float(v) for v in found.values()] == [3.0, 0.0]
    assert updates(interpreter, "keep") == [InPlace.NO]


def test_a_view_that_is_read_later_is_not_overwritten(stateful):
    interpreter = Interpreter(stateful)
    state = interpreter.make_state("view")
    for step in range(3):
        total, row = interpreter.predict({"x": np.full((1, 1, 3), step + 1)}, state, "view").values()
        assert (float(total), row.tolist()) == (3.0 * (step + 1), [[step] * 3])
    assert updates(interpreter, "view") == [InPlace.NO]


def test_states_do_not_share_memory(stateful):
    interpreter = Interpreter(stateful)
    state = interpreter.make_state("copy")
    for step in range(3):
        (total,) = interpreter.predict({"x": np.full((1, 1, 3), step + 1)}, state, "copy").values()
        assert total == 3 * (step + 1)
        assert not state.read_state("state_b").any()


def test_an_update_that_is_not_written_back_leaves_the_state_alone(stateful):
    interpreter = Interpreter(stateful)
    state = interpreter.make_state("local")
    (found,) = interpreter.predict({"x": np.ones((1, 1, 3))}, state, "local").values()
    assert found == 3
    assert not state.read_state("state_c").any()
    assert updates(interpreter, "local") == [InPlace.NO]


def test_states_are_rounded_to_float16_in_exact(stateful):
    interpreter = Interpreter(stateful)
    third = np.full((1, 1, 3), 1 / 3, np.float32)
    for function, inputs in (("decode", {"x": third, "index": np.array([0])}), ("add", {"x": third})):
        state = interpreter.make_state(function)
        interpreter.predict(inputs, state, function)
        assert state.tensors["state_c"][0, 0, 0] == float(np.float16(1 / 3))
    (found,) = interpreter.predict({"x": third}, function="stateless").values()
    assert found[0, 0, 0] == np.float32(2 / 3)


def test_what_a_state_cannot_hold_is_reported(stateful):
    interpreter = Interpreter(stateful)
    for function, inputs in (("decode", {"index": np.array([0])}), ("add", {})):
        state = interpreter.make_state(function)
        interpreter.predict({"x": np.full((1, 1, 3), 1e5), **inputs}, state, function)
        assert [(n.type, n.kind, n.count) for n in interpreter.nonfinite] == [
            ("slice_update", "inf", 3) if function == "decode" else ("write_state", "inf", 24)
        ]


def test_the_state_must_fit(stateful):
    interpreter = Interpreter(stateful)
    with pytest.raises(InputError, match="has states: state_c"):
        interpreter.predict({"x": ROW}, function="add")
    with pytest.raises(InputError, match="does not fit function 'add'"):
        interpreter.predict({"x": ROW}, interpreter.make_state("stateless"), "add")
    with pytest.raises(InputError, match="no state 'k'"):
        interpreter.make_state("add").read_state("k")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "'stateless' lacks x"),
        ({"x": ROW, "y": ROW}, "takes no y"),
        ({"x": ROW[0]}, r"'x' has shape \[1, 3\], expected float16 \[1, 1, 3\]"),
        ({"x": np.zeros((1, 1, 3), complex)}, "'x' is complex128"),
    ],
)
def test_wrong_inputs(stateful, inputs, message):
    with pytest.raises(InputError, match=message):
        Interpreter(stateful).predict(inputs, function="stateless")


def test_unknown_function_and_precision(stateful):
    with pytest.raises(InputError, match="no function 'main'; there are add, copy, decode"):
        Interpreter(stateful).predict({}, function="main")
    with pytest.raises(InputError, match="precision is 'fast'"):
        Interpreter(stateful, "fast")


def test_types_of_outputs(stateful):
    for precision, dtype in (("exact", np.float32), ("device", np.float16)):
        (found,) = Interpreter(stateful, precision).predict({"x": ROW}, function="stateless").values()
        assert found.dtype == dtype
    interpreter = Interpreter(stateful)
    with pytest.raises(InputError, match="'index' is float64"):
        interpreter.predict({"x": ROW, "index": np.array([0.0])}, interpreter.make_state("decode"), "decode")
    with pytest.raises(InputError, match="outside of int32"):
        interpreter.predict(
            {"x": ROW, "index": np.array([1 << 40])}, interpreter.make_state("decode"), "decode"
        )


def test_an_operation_that_cannot_run_is_named(stateful):
    interpreter = Interpreter(stateful)
    with pytest.raises(
        BundleError, match=r"\(slice_update\) of function 'decode' cannot run: the slice has shape"
    ):
        interpreter.predict({"x": ROW, "index": np.array([9])}, interpreter.make_state("decode"), "decode")


def test_on_op_sees_every_operation(stateful):
    interpreter, seen = Interpreter(stateful), []
    interpreter.predict({"x": ROW}, function="stateless", on_op=seen.append)
    assert [(r.function, r.type) for r in seen] == [("stateless", "mul")]
    assert next(iter(seen[0].outputs.values())).dtype == np.float32


IMAGE_SHAPE = (1, 3, 4, 6)


@pytest.mark.parametrize("layout", ["RGB", "BGR"])
def test_image_input_with_scale_and_bias(layout, tmp_path):
    def function(image):
        return mb.add(x=mb.mul(x=image, y=np.float32(1 / 127.5)), y=np.float32(-1))

    color = ct.colorlayout[layout]
    types_ = (ct.ImageType(name="image", shape=IMAGE_SHAPE, channel_first=True, color_layout=color),)
    write_package(
        {"main": (function, (np.zeros(IMAGE_SHAPE, np.float32),))},
        tmp_path / "m.mlpackage",
        input_types=types_,
    )
    interpreter = Interpreter(tmp_path / "m.mlpackage")
    assert interpreter.functions["main"].inputs[0].color == layout
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    wanted = (pixels if layout == "RGB" else pixels[..., ::-1]).transpose(2, 0, 1)[None] / 127.5 - 1
    for given in (Image.fromarray(pixels), pixels):
        (found,) = interpreter.predict({"image": given}).values()
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    with pytest.raises(InputError, match=r"'image' has shape \[1, 3, 5, 6\]"):
        interpreter.predict({"image": Image.new("RGB", (6, 5))})


def test_grayscale_image(tmp_path):
    types_ = (
        ct.ImageType(
            name="image", shape=(1, 1, 4, 6), channel_first=True, color_layout=ct.colorlayout.GRAYSCALE
        ),
    )
    write_package(
        {"main": (lambda image: mb.identity(x=image), (np.zeros((1, 1, 4, 6), np.float32),))},
        tmp_path / "m.mlpackage",
        input_types=types_,
    )
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    for given in (Image.fromarray(pixels), pixels):
        (found,) = Interpreter(tmp_path / "m.mlpackage").predict({"image": given}).values()
        np.testing.assert_array_equal(found[0, 0], pixels)


@pytest.fixture(scope="module")
def flexible(tmp_path_factory):
    path = tmp_path_factory.mktemp("flexible") / "range.mlpackage"
    types_ = (ct.TensorType("x", (1, ct.RangeDim(2, 6, default=3), 4), dtype=np.float32),)
    spec = mb.TensorSpec((1, get_new_symbol(), 4), types.fp32)
    write_package({"main": (lambda x: mb.reduce_sum(x=x, axes=[1]), (spec,))}, path, input_types=types_)
    shapes = ct.EnumeratedShapes(shapes=[[1, 3, 4], [1, 5, 4]], default=[1, 5, 4])
    types_ = (ct.TensorType("x", shapes, dtype=np.float32),)
    enumerated = path.with_name("enumerated.mlpackage")
    spec = mb.TensorSpec((1, get_new_symbol(), 4), types.fp32)
    write_package({"main": (lambda x: mb.reduce_sum(x=x, axes=[1]), (spec,))}, enumerated, input_types=types_)
    return path, enumerated


@pytest.mark.parametrize(
    ("kind", "allowed", "said"), [(0, {2, 3, 4, 5, 6}, r"2\.\.6"), (1, {3, 5}, r"\[1, 5, 4\] or")]
)
def test_flexible_shapes(flexible, kind, allowed, said):
    interpreter = Interpreter(flexible[kind])
    for n in range(1, 8):
        x = np.ones((1, n, 4), np.float32)
        if n in allowed:
            (found,) = interpreter.predict({"x": x}).values()
            assert found.tolist() == [[n] * 4]
        else:
            with pytest.raises(InputError, match=said):
                interpreter.predict({"x": x})
    assert interpreter.functions["main"].inputs[0].example_shape[1] == (3, 5)[kind]


RANDOM = {
    "random_normal": (lambda x: mb.random_normal(shape=mb.shape(x=x), mean=2.0, stddev=3.0, seed=7), 2, 3),
    "random_uniform": (lambda x: mb.random_uniform(shape=mb.shape(x=x), low=1.0, high=3.0, seed=7), 2, 0.577),
    "random_bernoulli": (lambda x: mb.random_bernoulli(shape=mb.shape(x=x), prob=0.25, seed=7), 0.25, 0.433),
    "random_categorical": (
        lambda x: mb.random_categorical(
            x=mb.add(x=x, y=np.array([0, 0, -99, 0], np.float32)), size=50, seed=7
        ),
        4 / 3,
        1.247,
    ),
}


@pytest.fixture(scope="module")
def random_package(tmp_path_factory):
    shape = np.zeros((2500, 4), np.float32)
    functions = {name: (build, (shape,)) for name, (build, *_) in RANDOM.items()}
    return write_package(functions, tmp_path_factory.mktemp("random") / "m.mlpackage")


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers(random_package, name):
    """Mean and deviation are what the distribution says; the same seed draws the same numbers."""
    _, mean, deviation = RANDOM[name]
    interpreter = Interpreter(random_package)
    (first,) = interpreter.predict({"x": np.zeros((2500, 4), np.float32)}, function=name).values()
    (second,) = interpreter.predict({"x": np.zeros((2500, 4), np.float32)}, function=name).values()
    np.testing.assert_array_equal(first, second)
    assert abs(first.mean() - mean) < 0.1
    assert abs(first.std() - deviation) < 0.1
