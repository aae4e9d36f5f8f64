"""Rules of the whole package, read from its source."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable
from graphlib import TopologicalSorter

import pytest

from tests.layers import (
    BEGIN,
    DOCUMENT,
    END,
    FILES,
    NAME,
    PACKAGE,
    arrows,
    drawing,
    heights,
    import_graph,
    imports_of,
    part_of,
    parts_imported,
    reachable,
)

# A part imports parts of earlier lines, of its own line as long as they go round in no circle, and itself.
LINES = [
    ["errors"],
    ["regular_file", "json_file", "yaml_file"],
    [
        "arithmetic",
        "io_names",
        "targets",
        "progress",
        "atomic_file",
        "user_cache",
        "cache_entries",
        "dataclass_io",
        "heap",
        "peak_memory",
        "available_memory",
        "stage_costs",
        "processors",
        "amounts",
        "outcomes",
        "mil",
    ],
    ["pictures", "preprocess", "prompt", "messages", "metrics", "intervals"],
    [
        "session",
        "prompt_cache",
        "prompt_reading",
        "generate",
        "answer_stream",
        "demo",
        "mix",
        "questions",
        "gates",
    ],
    ["recipe_settings", "recipe", "recipe_schema", "resolved_recipe"],
    ["activation_report", "manifest", "manifest_schema"],
    ["weights"],
    ["quantized"],
    ["checkpoint"],
    ["model"],
    ["quantization"],
    ["exporters"],
    ["runtime"],
    ["float16", "bench", "estimate", "evaluation"],
    ["bundle"],
    ["provenance", "predict"],
    ["verification"],
    ["delivery"],
    ["lint", "serve"],
    ["report"],
    ["pipeline"],
    ["doctor"],
    ["cli"],
    ["__main__"],
]
PLACE = {part: place for place, line in enumerate(LINES) for part in line}
TORCH_FREE = {"weights", "quantized", "checkpoint", "exporters"}
HEAVY = {"torch", "onnx", "onnxruntime", "coremltools", "mlx", "numba"}
MAX_LINES = 400


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
    if part != "__init__":  # the face for users, which imports late (tests/test_api.py)
        assert faults(part, source) == []


def test_no_imports_go_round_in_a_circle():
    order = list(TopologicalSorter(import_graph()).static_order())
    assert order.index("errors") < order.index("checkpoint") < order.index("runtime")


def test_the_drawing_of_the_layers_is_true():
    """Of the code as it stands: every part, every import that follows from no other, the order of LINES."""
    stored = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert stored.strip() == drawing().strip(), "docs/architecture.md is out of date: run `make docs`"
    assert "  pipeline --> " in stored
    assert stored.count("| [`") == len([part for part in import_graph() if part != "__main__"])


def test_what_follows_from_other_imports_is_not_drawn():
    graph = {"a": {"b", "c", "d"}, "b": {"c"}, "c": set(), "d": set()}
    assert arrows(graph) == {"a": {"b", "d"}, "b": {"c"}, "c": set(), "d": set()}
    assert heights(graph) == {"a": 2, "b": 1, "c": 0, "d": 0}
    graph = import_graph()
    drawn = arrows(graph)
    assert all(reachable(drawn, part) == reachable(graph, part) for part in drawn)


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


# What one module says, no other may say again.
PROGRESS = {"Callable[[float], None]", "Callable[[str, float], None]"}
PREFIXES = {
    "vision.",
    "projector.",
    "decoder.",
    "decoder.layers.",
    "decoder.embed_tokens.",
    "decoder.lm_head.",
}
SHARED_INPUTS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


def constants(nodes: Iterable[ast.expr]) -> list[str]:
    """The texts among some expressions."""
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def repeated_facts(source: str) -> list[str]:
    """Progress callbacks, parts of the model and groups of layers that a source defines for itself."""
    tree = ast.parse(source)
    formatted = {id(value) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for value in n.values}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node) in PROGRESS:
            found.append(f"line {node.lineno}: {ast.unparse(node)} is told in progress.py")
        if isinstance(node, ast.Constant) and node.value in PREFIXES and id(node) not in formatted:
            found.append(f"line {node.lineno}: '{node.value}' is told in weights/parts.py")
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            names = {text.rpartition(".")[2] for text in constants(node.elts)}
            if any(len(names & group) > 1 for group in SHARED_INPUTS):
                found.append(f"line {node.lineno}: {sorted(names)} is told in weights/parts.py")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_one_fact_has_one_place(path):
    name = path.relative_to(PACKAGE).as_posix()
    if name in {"progress.py", "weights/parts.py"} or name.startswith("mil/"):
        return
    assert repeated_facts(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "OnProgress = Callable[[str, float], None]",
        "def f(on_progress: Callable[[float], None] | None = None): ...",
        "x = name.startswith('vision.')",
        "x = name.startswith(('decoder.layers.', 'final.'))",
        "GROUP = ('self_attn.q_proj', 'self_attn.k_proj')",
    ],
)
def test_a_repeated_fact_is_noticed(source):
    assert len(repeated_facts(source)) == 1


def test_names_of_single_layers_are_no_repeated_facts():
    source = (
        "for i in range(3):\n    q, norm = f'decoder.layers.{i}.self_attn.q_proj', ('decoder.norm', 'q_proj')"
    )
    assert repeated_facts(source) == []


# What a function may measure. A docstring can claim more parameters, with the reason after these words.
MAX_PARAMETERS = 6
MAX_FUNCTION_LINES = 60
REASON = "More than six parameters:"


def large_functions(source: str, any_parameters: Callable[[str], bool] = lambda name: False) -> list[str]:
    """Names of functions and methods that are too long or take too much.

    Args:
        source: Of a module.
        any_parameters: Whether the function of a name may have any number of parameters.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        count = len(arguments) - (bool(arguments) and arguments[0].arg in ("self", "cls"))
        has_reason = REASON in (ast.get_docstring(node) or "")
        is_long = node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
        if is_long or (count > MAX_PARAMETERS and not has_reason and not any_parameters(node.name)):
            found.append(node.name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_stay_small(path):
    name = path.relative_to(PACKAGE).as_posix()

    def any_parameters(function: str) -> bool:
        """Operations take what Core ML gives them; the options of a command are its parameters."""
        return name.startswith("mil/ops/") or (name.startswith("cli/") and function == "command")

    found = large_functions(path.read_text(encoding="utf-8"), any_parameters)
    assert found == []


def test_a_large_function_is_noticed():
    wide = "def wide(self, a, b, c, d, e, *, f{}):\n    ..."
    assert large_functions(wide.format("")) == []
    assert large_functions(wide.format(", g")) == ["wide"]
    assert large_functions(wide.format(", g"), lambda name: name == "wide") == []
    assert large_functions(wide.format(", g").replace("...", f'"""Do.\n\n    {REASON} all.\n    """')) == []
    assert large_functions("def long():\n" + "    pass\n" * 60) == ["long"]
    assert large_functions("def long():\n" + "    pass\n" * 59) == []
