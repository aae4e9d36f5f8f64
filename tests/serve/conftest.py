"""Fixtures of the server's tests."""

import shutil
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def ray_home() -> Iterator[dict[str, str]]:
    """Ray writes a token into HOME, and sockets into RAY_TMPDIR, whose name must be short."""
    folder = tempfile.mkdtemp(prefix="ray")
    yield {"HOME": folder, "RAY_TMPDIR": folder}
    shutil.rmtree(folder, ignore_errors=True)
