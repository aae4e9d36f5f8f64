"""The bundle that servers serve in tests."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import load_recipe, without_data
from tests.planted import DEMO


@pytest.fixture(scope="module")
def ray_home() -> Iterator[dict[str, str]]:
    """Ray writes a token into HOME, and sockets into RAY_TMPDIR, whose name must be short."""
    folder = tempfile.mkdtemp(prefix="ray")
    yield {"HOME": folder, "RAY_TMPDIR": folder}
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, in four bits, as ONNX; it answers sensibly."""
    output = tmp_path_factory.mktemp("served") / "demo"
    export(DEMO, output, recipe=without_data(load_recipe("int4")), targets=["onnx"])
    return output
