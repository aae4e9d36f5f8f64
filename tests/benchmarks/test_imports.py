"""Every benchmark can be imported from a fresh `make setup`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = sorted(f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("*.py"))
IMPORT = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    print(module)
"""


def test_every_benchmark_can_be_imported():
    call = [sys.executable, "-c", IMPORT, *MODULES]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == MODULES
    assert "benchmarks.quantize_answers" in MODULES
