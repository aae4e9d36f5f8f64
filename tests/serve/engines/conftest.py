"""The demo as a bundle, for engines that run it."""

from pathlib import Path

import pytest

from tests.bundles import export_bundle, recipe
from tests.serve.engines.questions import DEMO


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int4 bundle of the demo checkpoint; read only."""
    return export_bundle(DEMO, tmp_path_factory.mktemp("served") / "demo", recipe("int4"))
