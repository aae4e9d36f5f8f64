"""What an installation without an extra says: one line that names it."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fastvlm_convert.errors import EXTRAS, MissingDependencyError
from fastvlm_convert.pipeline import export
from tests.cli.conftest import CHECKPOINT
from tests.mil.seeds import write_seeds

FP32 = ("--recipe", "fp32")
# Python imports this at startup, in the processes that a command starts, too.
HIDE = """
import os, sys
from importlib.machinery import PathFinder

hidden = os.environ["HIDDEN"].split()

class Installed:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)

sys.meta_path = [Installed if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def without(tmp_path):
    """Runs a command where some packages are not installed."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)

    def run(hidden: str, *argv: object) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
        environment = {**os.environ, "HIDDEN": hidden, "PYTHONPATH": path}
        command = [sys.executable, "-m", "fastvlm_convert", *map(str, argv)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return next(p for p in write_seeds(tmp_path_factory.mktemp("seeds")) if p.stem == "decoder")


@pytest.fixture(scope="module")
def mlx_bundle(tmp_path_factory):
    """Made on any machine: no library of MLX is needed to write its files."""
    bundle = tmp_path_factory.mktemp("mlx") / "bundle"
    export(CHECKPOINT, bundle, recipe="fp16", targets="mlx")
    return bundle


@pytest.mark.parametrize(
    ("hidden", "argv", "what"),
    [
        ("torch", ("run", CHECKPOINT, "Hi"), "running a checkpoint needs torch"),
        ("torch", ("mil", "PACKAGE"), "this command needs torch"),
        (
            "onnx",
            ("export", CHECKPOINT, *FP32, "--target", "onnx"),
            "the ONNX target needs onnx",
        ),
        ("onnxruntime", ("run", "BUNDLE", "Hi"), "running ONNX bundles needs onnxruntime"),
        ("onnxruntime", ("bench", "BUNDLE", "--trials", "1"), "running ONNX bundles needs onnxruntime"),
        ("coremltools", ("mil", "PACKAGE"), "reading a Core ML package needs coremltools"),
        (
            "model_signing",
            ("bundle", "sign", "BUNDLE", "--key", "k"),
            "a bundle's signature needs model_signing",
        ),
        (
            "coremltools",
            ("export", CHECKPOINT, *FP32, "--target", "coreml"),
            "the Core ML target needs coremltools",
        ),
        ("mlx", ("run", "MLX_BUNDLE", "Hi"), "running MLX bundles needs mlx"),
        ("matplotlib", ("report", "BUNDLE", "-o", "r.html"), "drawing a report needs matplotlib"),
        ("onnx", ("estimate", "BUNDLE"), "an estimate of the onnx target needs onnx"),
    ],
)
def test_a_command_names_the_extra_that_it_misses(
    without, fp32_bundle, mlx_bundle, package, tmp_path, hidden, argv, what
):
    inputs = {"BUNDLE": fp32_bundle, "MLX_BUNDLE": mlx_bundle, "PACKAGE": package}
    output = ("-o", tmp_path / "new") if "export" in argv else ()
    done = without(hidden, *(inputs.get(argument, argument) for argument in argv), *output)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.strip().splitlines()
    assert f"error: {what}, which is not installed" in lines[-2]
    assert f"pip install '.[{EXTRAS[hidden]}]'" in lines[-1]
    assert not (tmp_path / "new").exists()


def test_inspect_and_plan_need_no_extra(without):
    targets = ("--recipe", "fp16", "--target", "onnx", "--target", "coreml")
    for argv in (("inspect", CHECKPOINT), ("plan", CHECKPOINT, *targets)):
        done = without(" ".join(EXTRAS), *argv)
        assert (done.returncode, done.stderr.count("error")) == (0, 0), done.stderr


def test_a_module_that_no_extra_brings_is_a_bug():
    missing = ModuleNotFoundError("No module named 'nowhere'", name="nowhere")
    with pytest.raises(ModuleNotFoundError, match="nowhere") as caught:
        MissingDependencyError.of(missing, "this")
    assert caught.value is missing


def test_every_extra_that_errors_name_is_declared():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert any(line.replace("-", "_").startswith(package) for line in extras[extra])
    everything = [extra for extra in dict.fromkeys(EXTRAS.values()) if extra != "ray"]  # 500 MB
    assert extras["all"] == [f"fastvlm-convert[{','.join(everything)}]"]
