"""Tests that run Ray skip where it is not installed."""

import importlib.util

import pytest

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(
    not HAS_RAY, reason="Ray is not installed: pip install -e '.[ray]' -c constraints.txt (500 MB)"
)
