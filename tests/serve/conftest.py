"""Fixtures of the server's tests."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bundles import copy_bundle, edit_manifest


@pytest.fixture(scope="module")
def ray_home() -> Iterator[dict[str, str]]:
    """Ray writes a token into HOME, and sockets into RAY_TMPDIR, whose name must be short."""
    folder = tempfile.mkdtemp(prefix="ray")
    yield {"HOME": folder, "RAY_TMPDIR": folder}
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def endless_bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with an end token that it never says, for answers of any length."""
    bundle = copy_bundle(demo_bundle, tmp_path_factory.mktemp("endless"))
    edit_manifest(bundle, lambda manifest: manifest["contract"].update(eos_token_ids=[0]))
    return bundle
