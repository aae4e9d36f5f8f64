"""Rules of the whole package, read from its source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fastvlm_convert

PACKAGE = Path(fastvlm_convert.__file__).parent
NAME = PACKAGE.name
FILES = sorted(PACKAGE.rglob("*.py"))

# A part imports parts of earlier lines, of its own line as long as they go round in no circle, and itself.
LINES = [
    ["errors"],
    ["io_names", "arithmetic", "progress", "atomic_file", "user_cache", "dataclass_io", "mil"],
    ["manifest", "recipe", "recipe_schema", "preprocess", "metrics", "generate", "demo", "questions"],
    ["weights"],
    ["quantized"],
    ["checkpoint"],
    ["model"],
    ["quantization"],
    ["exporters"],
    ["runtime"],
    ["float16", "verification", "bench"],
    ["bundle"],
    ["predict"],
    ["pipeline"],
    ["cli"],
    ["__main__"],
]
PLACE = {part: place for place, line in enumerate(LINES) for part in line}
TORCH_FREE = {"weights", "quantized", "checkpoint", "exporters"}
HEAVY = {"torch", "onnx", "onnxruntime", "coremltools"}
MAX_LINES = 400


def part_of(path: Path) -> str:
    """The top-level module or folder that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(source: str) -> Iterator[tuple[str, int]]:
    """Every module that a source imports anywhere, inside functions too, with the line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert node.module is not None
            if node.module == NAME:  # `from package import part`
                yield from ((f"{NAME}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def parts_imported(source: str) -> Iterator[tuple[str, int]]:
    """The parts of our own package that a source imports; constants of the package itself are none."""
    for module, line in imports_of(source):
        names = module.split(".")
        if names[0] == NAME and len(names) > 1 and not names[1].startswith("__version"):
            yield names[1], line


def faults(part: str, source: str) -> list[str]:
    """Imports that a part may not have."""
    found = []
    for imported, line in parts_imported(source):
        if PLACE[imported] > PLACE[part]:
            found.append(f"line {line}: {part} imports {imported}")
        if part == "exporters" and imported in ("model", "quantization"):
            found.append(f"line {line}: exporters imports {imported}")
        if part in ("errors", "io_names"):
            found.append(f"line {line}: {part} is a leaf and imports {imported}")
    for module, line in imports_of(source):
        if part in TORCH_FREE and module.split(".")[0] == "torch":
            found.append(f"line {line}: {part} imports torch")
    return found


def test_every_part_has_its_place():
    assert {part_of(path) for path in FILES} - {"__init__"} <= set(PLACE)
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_left_only(path):
    part = part_of(path)
    source = path.read_text(encoding="utf-8")
    if part == "__init__":
        assert list(imports_of(source)) == []
    else:
        assert faults(part, source) == []


def test_no_imports_go_round_in_a_circle():
    graph = {part: set() for part in PLACE}
    for path in FILES:
        if part_of(path) in graph:
            graph[part_of(path)] |= {p for p, _ in parts_imported(path.read_text(encoding="utf-8"))}
    order = list(TopologicalSorter({part: used - {part} for part, used in graph.items()}).static_order())
    assert order.index("errors") < order.index("checkpoint") < order.index("runtime")


def test_the_interpreter_of_ml_programs_can_be_used_alone():
    interpreter = PACKAGE / "mil"
    allowed = (f"{NAME}.errors", f"{NAME}.mil")
    for path in interpreter.rglob("*.py"):
        ours = [m for m, _ in imports_of(path.read_text(encoding="utf-8")) if m.startswith(f"{NAME}.")]
        assert [module for module in ours if not module.startswith(allowed)] == [], path


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("weights", f"from {NAME}.checkpoint.files import read_json"),
        ("weights", f"def f():\n    import {NAME}.cli.main"),
        ("generate", f"from {NAME} import runtime"),
        ("checkpoint", "import torch"),
        ("exporters", "def f():\n    from torch.nn import Module"),
        ("exporters", f"from {NAME}.model.vision import FastViTHD"),
        ("io_names", f"from {NAME}.errors import ConversionError"),
    ],
)
def test_a_forbidden_import_is_noticed(part, source):
    assert len(faults(part, source)) == 1


def test_an_allowed_import_is_no_fault():
    source = f"import torch\nfrom {NAME}.weights.fold import fold\nfrom {NAME} import __version__\n"
    assert faults("model", source) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_small_and_do_not_print(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_LINES
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    assert [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"] == []


def heavy_modules_after(statement: str) -> set[str]:
    """Which heavy libraries a fresh interpreter has loaded after a statement."""
    script = f"{statement}\nimport sys\nsys.stdout.write(' '.join({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    ["checkpoint.checkpoint", "weights.fold", "preprocess", "generate", "metrics", "exporters.coreml.sizes"],
)
def test_reading_a_checkpoint_loads_no_heavy_library(module):
    assert heavy_modules_after(f"import {NAME}.{module}") == set()


def test_a_heavy_library_is_noticed():
    assert heavy_modules_after(f"import {NAME}.model.fastvlm") == {"torch"}
