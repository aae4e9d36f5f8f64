"""Damaged and hostile packages: an error that says what is wrong, no crash, no giant allocation."""

import json
import shutil
from collections import Counter

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil import Interpreter
from fastvlm_convert.mil.package import open_package
from fastvlm_convert.mil.proto import mil, model
from tests.mil.mutations import MANIFEST, MODEL, WEIGHTS, Seed, attempt, clear, damage
from tests.mil.programs import write_package
from tests.mil.rewrites import rewrite
from tests.mil.seeds import write_seeds


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return write_seeds(tmp_path_factory.mktemp("seeds"))


@pytest.fixture
def decoder(seeds, tmp_path):
    return shutil.copytree(seeds[1], tmp_path / "decoder.mlpackage")


def edit(package, change):
    """Change the protobuf of a package."""
    spec = model.Model.FromString((package / MODEL).read_bytes())
    change(spec)
    (package / MODEL).write_bytes(spec.SerializeToString())
    return package


def operations(spec):
    (function,) = spec.mlProgram.functions.values()
    return function.block_specializations[function.opset].operations


def operation(spec, kind):
    return next(o for o in operations(spec) if o.type == kind)


def weight(spec):
    return next(
        o for o in operations(spec) if o.type == "const" and o.attributes["val"].HasField("blobFileValue")
    )


def test_the_seeds_run(seeds):
    assert [attempt(seed) for seed in seeds] == ["ran"] * len(seeds)


def test_a_truncated_weight_file(decoder):
    content = (decoder / WEIGHTS).read_bytes()
    (decoder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match=r"weights of operation .* but the file has \d+ bytes"):
        Interpreter(decoder)


def test_an_empty_and_a_missing_weight_file(decoder):
    (decoder / WEIGHTS).write_bytes(b"")
    with pytest.raises(BundleError, match="weight file is empty"):
        Interpreter(decoder)
    (decoder / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=r"weight file 'weights/weight\.bin' is missing"):
        Interpreter(decoder)


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (1 << 62, "declared at byte 4611686018427387904, but the file has"),
        (72, "no weights of .* lie at byte 72"),
    ],
)
def test_an_offset_outside_the_file(decoder, offset, message):
    def change(spec):
        weight(spec).attributes["val"].blobFileValue.offset = offset

    with pytest.raises(BundleError, match=message):
        Interpreter(edit(decoder, change))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (4, b"\x02\x00\x00\x00", "declared as .*, but stored as type 2"),
        (8, b"\x01", "have .* bytes, expected"),
        (16, b"\xff\xff\xff", "end at byte"),
    ],
)
def test_a_record_that_contradicts_the_program(decoder, at, value, message):
    content = bytearray((decoder / WEIGHTS).read_bytes())
    place = weight(open_package(decoder).spec).attributes["val"].blobFileValue.offset
    content[place + at : place + at + len(value)] = value
    (decoder / WEIGHTS).write_bytes(content)
    with pytest.raises(BundleError, match=message):
        Interpreter(decoder)


@pytest.mark.parametrize(
    "name", ["../../../../outside.bin", "/etc/passwd", "@model_path/../../../../x", "a\0b", "x" * 5000]
)
def test_a_weight_path_that_leaves_the_package(decoder, name, tmp_path):
    (tmp_path / "outside.bin").write_bytes(b"x")

    def change(spec):
        weight(spec).attributes["val"].blobFileValue.fileName = name

    with pytest.raises(BundleError, match=r"leaves the package|impossible"):
        Interpreter(edit(decoder, change))


def test_a_link_that_leaves_the_package(decoder, tmp_path):
    (decoder / WEIGHTS).rename(tmp_path / "elsewhere.bin")
    (decoder / WEIGHTS).symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(BundleError, match="leaves the package"):
        Interpreter(decoder)


def test_an_unknown_version(decoder):
    def change(spec):
        spec.specificationVersion = 99

    with pytest.raises(BundleError, match=r"unknown specification version 99; known are 6 \(iOS 15\)"):
        Interpreter(edit(decoder, change))


def test_no_ml_program(decoder):
    def network(spec):
        spec.neuralNetwork.SetInParent()

    with pytest.raises(BundleError, match="the model is of type neuralNetwork; only ML programs"):
        Interpreter(edit(decoder, network))
    with pytest.raises(BundleError, match="the model is empty"):
        Interpreter(edit(decoder, lambda spec: spec.ClearField("neuralNetwork")))


def test_an_unknown_operation_is_named_before_anything_runs(decoder):
    def change(spec):
        operation(spec, "silu").type = "quantum_gelu"

    with pytest.raises(
        BundleError, match=r"operation 'silu_0' of function 'main' is of the unknown type 'quantum_gelu'"
    ):
        Interpreter(edit(decoder, change))


def test_values_that_are_missing_or_made_later(decoder):
    def cycle(spec):
        first, last = operation(spec, "silu"), operations(spec)[-1]
        first.inputs["x"].arguments[0].name = last.outputs[0].name

    with pytest.raises(
        BundleError, match=r"'silu_0' \(silu\), input 'x' reads 'linear_1', which no operation before it"
    ):
        Interpreter(edit(decoder, cycle))

    def missing(spec):
        operation(spec, "silu").inputs["x"].arguments[0].name = "nobody"

    with pytest.raises(BundleError, match="reads 'nobody'"):
        Interpreter(edit(decoder, missing))

    def twice(spec):
        operation(spec, "silu").inputs["x"].arguments[0].name = "x"
        operation(spec, "silu").outputs[0].name = "x"

    with pytest.raises(BundleError, match="defines 'x' a second time"):
        Interpreter(edit(decoder, twice))


def test_inputs_that_an_operation_does_not_have(decoder):
    def change(spec):
        silu = operation(spec, "silu")
        silu.inputs["y"].CopyFrom(silu.inputs["x"])
        del silu.inputs["x"]

    with pytest.raises(BundleError, match="has no input 'y' and lacks its input 'x'"):
        Interpreter(edit(decoder, change))


def test_parameters_that_are_no_inputs_cannot_be_given(decoder):
    """`limit` and its kin are set by us; a program must not reach them."""

    def change(spec):
        linear = operation(spec, "linear")
        linear.inputs["limit"].CopyFrom(linear.inputs["x"])

    with pytest.raises(BundleError, match=r"\(linear\) has no input 'limit'"):
        Interpreter(edit(decoder, change))


def test_states_and_values_are_not_confused(decoder):
    def change(spec):
        operation(spec, "silu").inputs["x"].arguments[0].name = "state_k"

    with pytest.raises(BundleError, match="takes a value, not the state 'state_k'"):
        Interpreter(edit(decoder, change))


@pytest.mark.parametrize("kind", ["list_gather", "list_length"])
def test_a_tensor_where_a_list_belongs(seeds, tmp_path, kind):
    """In words of the program, not of Python or torch."""

    def change(spec):
        operation(spec, kind).inputs["ls"].arguments[0].name = "x"

    package = edit(shutil.copytree(seeds[4], tmp_path / "list.mlpackage"), change)
    message = rf"\({kind}\) .* it cannot take these inputs together: .*'ls' is float32 \[2, 4\]"
    with pytest.raises(BundleError, match=message):
        Interpreter(package).predict({"x": np.ones((2, 4))})


def test_a_list_where_a_tensor_belongs(seeds, tmp_path):
    def change(spec):
        (loop,) = (o for o in operations(spec) if o.type == "while_loop")
        gather = operation(spec, "list_gather")
        gather.type = "shape"
        gather.inputs["x"].arguments.add().name = loop.outputs[1].name
        del gather.inputs["ls"], gather.inputs["indices"]

    package = edit(shutil.copytree(seeds[4], tmp_path / "list.mlpackage"), change)
    with pytest.raises(
        BundleError, match=r"\(shape\) .* cannot take these inputs together: 'x' is a list of 3"
    ):
        Interpreter(package).predict({"x": np.ones((2, 4))})


def test_a_result_of_another_type_than_declared(decoder):
    def change(spec):
        operation(spec, "silu").outputs[0].type.tensorType.dataType = mil.INT32

    interpreter = Interpreter(edit(decoder, change))
    inputs = {"x": np.ones((1, 1, 32)), "position": np.array([0])}
    with pytest.raises(BundleError, match="'silu_0' is float32, the program declares int32"):
        interpreter.predict(inputs, interpreter.make_state())


@pytest.mark.parametrize("size", [1 << 40, (1 << 64) - 1])
def test_absurd_shapes(decoder, size):
    def change(spec):
        (function,) = spec.mlProgram.functions.values()
        function.inputs[0].type.tensorType.dimensions[0].constant.size = size

    with pytest.raises(BundleError, match="absurd shape"):
        Interpreter(edit(decoder, change))


def test_a_result_out_of_proportion(tmp_path):
    """The shape is only computed when it runs: 100000 x 100000 elements from an input of one."""
    shape = lambda x: mb.fill(shape=mb.concat(values=[x, x], axis=0), value=1.0)  # noqa: E731
    write_package({"main": (shape, (np.zeros(1, np.int32),))}, tmp_path / "m.mlpackage")
    with pytest.raises(BundleError, match=r"fill.* a result of shape \[100000, 100000\] exceeds"):
        Interpreter(tmp_path / "m.mlpackage").predict({"x": np.array([100000])})


def test_an_endless_loop(tmp_path):
    def function(x):
        return mb.while_loop(
            _cond=lambda i: mb.greater(x=i, y=-1.0), _body=lambda i: mb.abs(x=i), loop_vars=(x,)
        )

    write_package({"main": (function, (np.zeros(1, np.float32),))}, tmp_path / "m.mlpackage")
    with pytest.raises(BundleError, match="did not end within 20000 iterations"):
        Interpreter(tmp_path / "m.mlpackage").predict({"x": np.ones(1, np.float32)})


def test_malformed_protobuf(decoder):
    (decoder / MODEL).write_bytes(b"\x0a\xff\xff\xff\xff\xff not a protobuf")
    with pytest.raises(BundleError, match="no valid protobuf"):
        Interpreter(decoder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
        ("[]", "names no root model"),
        ('{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": 3}}}', "gives the path 3"),
        ('{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "../../x"}}}', "leaves the package"),
        ('{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "x"}}}', "'x' is missing"),
    ],
)
def test_a_bad_manifest(decoder, text, message):
    (decoder / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=message):
        Interpreter(decoder)


def test_not_a_package(tmp_path):
    with pytest.raises(BundleError, match=r"^there is no such package \(nope\)$"):
        Interpreter("nope")
    tmp_path.joinpath("m.mlmodel").write_bytes(b"")
    with pytest.raises(BundleError, match=r"not a Core ML package: a \.mlpackage is a folder"):
        Interpreter(tmp_path / "m.mlmodel")
    tmp_path.joinpath("m.mlpackage").mkdir()
    with pytest.raises(BundleError, match="cannot read the package's manifest"):
        Interpreter(tmp_path / "m.mlpackage")


def test_text_where_numbers_belong(decoder):
    def change(spec):
        value = next(
            o
            for o in operations(spec)
            if o.type == "const" and o.attributes["val"].HasField("immediateValue")
        )
        value.attributes["val"].immediateValue.tensor.strings.values.append("x")

    with pytest.raises(BundleError, match="is declared as int32, but holds strings"):
        Interpreter(edit(decoder, change))


def test_the_protobuf_classes_are_coremltools_own():
    from coremltools.proto import MIL_pb2, Model_pb2

    assert model.Model is Model_pb2.Model
    assert mil.Operation is MIL_pb2.Operation
    assert ct.__version__


# How often each seed is changed, and how many of these end in an error, or run all the same, at the least.
# benchmarks/mil_fuzz.py does 100,000.
FUZZED = {"bytes": (120, 250, 40), "program": (60, 150, 80)}


@pytest.mark.parametrize("way", FUZZED)
def test_fuzz(way, seeds, tmp_path):
    """Nothing but errors for the user comes out of damaged packages."""
    outcomes = Counter()
    count, refused, sound = FUZZED[way]
    change = {"bytes": damage, "program": rewrite}[way]
    for package in seeds:
        seed = Seed.read(package)
        folder = tmp_path / seed.name
        for number in range(count):
            changed = change(seed, number)
            seed.write(folder, changed)
            outcomes[attempt(folder)] += 1
            seed.write(folder, {path: seed.files[path] for path in changed})
        clear(folder)
    assert sum(outcomes.values()) == count * len(seeds)
    assert outcomes["BundleError"] > refused
    assert outcomes["ran"] > sound  # much damage leaves a sound program


def test_manifest_in_coremltools_own_form(seeds):
    assert json.loads((seeds[0] / MANIFEST).read_text())["fileFormatVersion"] == "1.0.0"
