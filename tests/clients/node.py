"""Programs in JavaScript that tests run, and the packages that they need."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGES = HERE / "node_modules"


def need_packages() -> None:
    """Skip the test where Node or a client is not installed."""
    if shutil.which("node") is None:
        pytest.skip("Node 20 or later is not installed (Debian: apt-get install nodejs npm)")
    if not (PACKAGES / ".package-lock.json").is_file():
        pytest.skip("the clients of tests/clients are not installed: run `make clients`")


def run_node(script: str, job: str, timeout: int = 600) -> None:
    """Run one of our scripts with a job on its standard input.

    Args:
        script: Its name in this folder.
        job: JSON.
        timeout: Seconds.
    """
    done = subprocess.run(
        ["node", HERE / script], input=job, capture_output=True, text=True, timeout=timeout, cwd=HERE
    )
    assert done.returncode == 0, done.stderr[-3000:]
