"""Every benchmark can be imported from a fresh `make setup`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = [path.relative_to(ROOT) for path in (ROOT / "benchmarks").rglob("*.py") if path.stem != "__init__"]
MODULES = sorted(".".join(path.with_suffix("").parts) for path in FILES)
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
