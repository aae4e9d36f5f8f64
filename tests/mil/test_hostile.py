"""Packages that were made to do harm: pipes, devices, loops of links, sizes that no machine has."""

import os
import resource
import shutil
import signal

import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813

from fastvlm_convert.cli.main import main
from fastvlm_convert.errors import BundleError, ConversionError
from fastvlm_convert.mil import Interpreter
from fastvlm_convert.mil.proto import mil, model
from fastvlm_convert.mil.survey import survey_package
from tests.mil.mutations import MANIFEST, MODEL, WEIGHTS
from tests.mil.programs import write_package

SECONDS = 30  # far more than any refusal takes
HUGE = 1 << 32


class HangError(Exception):
    """An attempt took too long."""


@pytest.fixture(autouse=True)
def _clock():
    """A pipe or a device may block for ever."""

    def hang(signum, frame):
        raise HangError

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    weight = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    build = lambda x: mb.linear(x=x, weight=weight)  # noqa: E731
    path = tmp_path_factory.mktemp("sound") / "m.mlpackage"
    return write_package({"main": (build, (np.zeros((1, 32), np.float32),))}, path)


@pytest.fixture
def package(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "m.mlpackage")


def replace(file, kind):
    """Put something else in the place of a file."""
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "folder":
        file.mkdir()
    else:
        with file.open("wb") as stream:
            stream.truncate(HUGE)  # takes no room on disk


REFUSALS = {
    ("pipe", MANIFEST): "manifest is not a regular file",
    ("device", MANIFEST): "manifest is not a regular file",
    ("loop", MANIFEST): "cannot read the package's manifest: Too many levels of symbolic links",
    ("folder", MANIFEST): "manifest is not a regular file",
    ("huge", MANIFEST): f"manifest has {HUGE} bytes, expected at most",
    ("pipe", MODEL): "is not a regular file",
    ("device", MODEL): "the path of the program leaves the package",
    ("loop", MODEL): "the path of the program is impossible|cannot read the program",
    ("folder", MODEL): "is not a regular file",
    ("huge", MODEL): f"the program has {HUGE} bytes, expected at most",
    ("pipe", WEIGHTS): "is not a regular file",
    ("device", WEIGHTS): "the path of the weight file leaves the package",
    ("loop", WEIGHTS): "the path of the weight file is impossible|is missing",
    ("folder", WEIGHTS): "is not a regular file",
    ("huge", WEIGHTS): "no weights of",
}


@pytest.mark.parametrize(("kind", "file"), REFUSALS)
def test_what_is_not_the_file_it_should_be(package, kind, file):
    replace(package / file, kind)
    with pytest.raises(BundleError, match=REFUSALS[kind, file]):
        Interpreter(package)
    with pytest.raises(BundleError):
        survey_package(package)


def test_what_is_not_a_package(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "file").write_bytes(b"")
    said = {
        "pipe": "not a Core ML package",
        "loop": "cannot open the package: Too many levels of symbolic links",
        "dangling": "there is no such package",
        "file/inside": "there is no such package",
        "x" * 5000: "cannot open the package: File name too long",
        "a\0b": "cannot open the package: embedded null byte",
        "": "cannot read the package's manifest: No such file",
    }
    for name, message in said.items():
        with pytest.raises(BundleError, match=message):
            Interpreter(tmp_path / name)


def test_a_weight_file_of_four_gigabytes_takes_no_memory(package):
    """What is beyond the weights is never read."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (package / WEIGHTS).open("r+b") as stream:
        stream.truncate(HUGE)
    (found,) = Interpreter(package).predict({"x": np.eye(1, 32, 3)}).values()
    np.testing.assert_array_equal(found[0], np.arange(64) * 32 + 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_the_command_says_it_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["mil", "nope"]) == 2
    assert "error: there is no such package (nope)" in capsys.readouterr().err


def edited(package, change):
    spec = model.Model.FromString((package / MODEL).read_bytes())
    (function,) = spec.mlProgram.functions.values()
    change(function, function.block_specializations[function.opset])
    (package / MODEL).write_bytes(spec.SerializeToString())
    return package


def test_a_result_that_no_machine_holds(package):
    def change(function, block):
        del function
        (output,) = block.operations[-1].outputs
        output.type.tensorType.dimensions[0].constant.size = 1 << 24

    with pytest.raises(
        BundleError, match=r"declares a result of shape \[16777216, 64\], more than can be run"
    ):
        Interpreter(edited(package, change))


def test_states_that_no_machine_holds(package):
    """Each alone is possible; all of them take half a terabyte."""

    def change(function, block):
        del block
        for i in range(64):
            state = function.inputs.add(name=f"s{i}").type.stateType.wrappedType.tensorType
            state.dataType, state.rank = mil.FLOAT16, 1
            state.dimensions.add().constant.size = 1 << 31

    interpreter = Interpreter(edited(package, change))
    with pytest.raises(BundleError, match=r"takes 549\.\d GB of memory, this machine has|not enough memory"):
        interpreter.predict({"x": np.zeros((1, 32))}, interpreter.make_state())


def test_the_memory_of_a_function_is_known_before_it_runs(sound):
    plan = Interpreter(sound)._plans["main"]
    weight, result = 4 * 64 * 32, 4 * 64
    assert weight + result <= plan.needed_bytes <= weight + 3 * result


def test_a_million_operations(package):
    def change(function, block):
        del function
        raw = block.SerializeToString()
        block.ParseFromString(raw + b"".join([b"\x1a\x00"] * (1 << 18)))

    assert mil.Block.DESCRIPTOR.fields_by_name["operations"].number == 3
    with pytest.raises(BundleError, match=r"function 'main' has 2621\d\d operations, more than 262144"):
        Interpreter(edited(package, change))


@pytest.mark.parametrize("size", [1 << 29, 1 << 40, -1])
def test_a_default_shape_that_no_machine_holds(package, size, capsys):
    """`mil --profile` makes inputs up in the shape that the description gives."""
    spec = model.Model.FromString((package / MODEL).read_bytes())
    (function,) = spec.mlProgram.functions.values()
    function.inputs[0].type.tensorType.dimensions[0].unknown.SetInParent()
    spec.description.input[0].type.multiArrayType.shape[0] = size
    (package / MODEL).write_bytes(spec.SerializeToString())
    code = main(["mil", str(package), "--profile"])
    said = capsys.readouterr()
    assert (code, "too large for an example" in said.err) == ((0, False) if size < 0 else (2, True))


@pytest.mark.slow
def test_loops_inside_of_loops(tmp_path):
    """Each ends in time, all of them together would take days."""

    def count(depth):
        if depth == 0:
            return lambda i: mb.add(x=i, y=1)
        return lambda i: (
            mb.while_loop(
                _cond=lambda j: mb.less(x=j, y=15_000),
                _body=count(depth - 1),
                loop_vars=(mb.mul(x=i, y=0),),
            ),
            mb.add(x=i, y=1),
        )[1]

    def build(x):
        return mb.while_loop(_cond=lambda i: mb.less(x=i, y=15_000), _body=count(2), loop_vars=(x,))

    path = write_package({"main": (build, (np.zeros(1, np.int32),))}, tmp_path / "m.mlpackage")
    signal.alarm(0)
    with pytest.raises(BundleError, match=r"the loops of one run take more than \d+ iterations"):
        Interpreter(path, check_finite=False).predict({"x": np.zeros(1, np.int32)})


def test_a_list_that_never_ends(tmp_path):
    def build(x):
        ls = mb.make_list(init_length=1, elem_shape=(1,))
        ls = mb.list_write(ls=ls, index=mb.squeeze(x=x), value=np.zeros(1, np.float32))
        return mb.list_length(ls=ls)

    path = write_package({"main": (build, (np.zeros(1, np.int32),))}, tmp_path / "m.mlpackage")
    interpreter = Interpreter(path)
    assert interpreter.predict({"x": np.array([9])}).popitem()[1] == 10
    with pytest.raises(ConversionError, match="a list of 2147483648 elements; at most 65536 are possible"):
        interpreter.predict({"x": np.array([2**31 - 1])})
