"""Every benchmark can be imported from a fresh `make setup`, without what only the extra `peers` brings."""

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)
IMPORT = """
import importlib, sys
hidden, *modules = sys.argv[1:]
sys.modules.update(dict.fromkeys(hidden.split(",")))  # None there makes `import` fail
for module in modules:
    importlib.import_module(module)
    print(module)
"""


def only_for_peers() -> set[str]:
    """What the extra `peers` brings that `make setup` does not, as modules."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    names = {name: {Requirement(line).name for line in extras[name]} for name in ("peers", "dev")}
    return {name.removesuffix("-python").replace("-", "_") for name in names["peers"] - names["dev"]}


def test_every_benchmark_can_be_imported():
    hidden = only_for_peers()
    assert hidden >= {"transformers", "llama_cpp"}
    call = [sys.executable, "-c", IMPORT, ",".join(sorted(hidden)), *MODULES]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == MODULES
    assert "benchmarks.real_model" in MODULES
