"""The demo as a bundle, for engines that run it."""

from pathlib import Path

import pytest

from tests.bundles import copy_bundle, edit_manifest, export_bundle, recipe
from tests.serve.engines.questions import DEMO


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int4 bundle of the demo checkpoint; read only."""
    return export_bundle(DEMO, tmp_path_factory.mktemp("served") / "demo", recipe("int4"))


@pytest.fixture(scope="session")
def endless_bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with an end token that it never says, for answers of any length."""
    bundle = copy_bundle(demo_bundle, tmp_path_factory.mktemp("endless"))
    edit_manifest(bundle, lambda manifest: manifest["contract"].update(eos_token_ids=[0]))
    return bundle
