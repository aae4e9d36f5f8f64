"""Prometheus' own program for rules, where it is installed."""

import os
import shutil
import subprocess

import pytest

PROMTOOL = os.environ.get("PROMTOOL") or shutil.which("promtool")

needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool: `apt-get install prometheus`, or name one in PROMTOOL"
)


def promtool(*arguments, folder=None):
    """Its exit code, and all that it said."""
    done = subprocess.run(
        [PROMTOOL, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr
