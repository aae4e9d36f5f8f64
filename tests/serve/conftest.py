"""The bundles that servers serve in tests."""

from pathlib import Path

import pytest

from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import load_recipe, without_data
from tests.bundles import copy_bundle, edit_manifest
from tests.planted import DEMO


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, in four bits, as ONNX; it answers sensibly."""
    output = tmp_path_factory.mktemp("served") / "demo"
    export(DEMO, output, recipe=without_data(load_recipe("int4")), targets=["onnx"])
    return output


@pytest.fixture(scope="session")
def endless_bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with an end token that it never says, for answers of any length."""
    bundle = copy_bundle(demo_bundle, tmp_path_factory.mktemp("endless"))
    edit_manifest(bundle, lambda manifest: manifest["contract"].update(eos_token_ids=[0]))
    return bundle
