"""`fastvlm-convert mil`: what it prints, also of packages that cannot be run."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert import mil as mil_package
from fastvlm_convert.cli.main import main
from fastvlm_convert.mil.proto import model
from tests.mil.mutations import MODEL
from tests.mil.seeds import write_seeds
from tests.published_schema import problems_of_document


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return {p.stem: p for p in write_seeds(tmp_path_factory.mktemp("command"))}


def document(capsys, package, *flags):
    assert main(["mil", str(package), "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert problems_of_document(found) == []
    return found


def test_json(packages, capsys):
    found = document(capsys, packages["decoder"])
    assert (found["command"], found["status"]) == ("mil", "passed")
    assert (found["deployment_target"], found["default_function"]) == ("iOS 18", "main")
    function = found["functions"]["main"]
    assert [(v["name"], v["dtype"], v["shape"]) for v in function["inputs"]] == [
        ("x", "float16", [1, 1, 32]),
        ("position", "int32", [1]),
    ]
    assert [(v["name"], v["shape"]) for v in function["states"]] == [("state_k", [1, 4, 16])]
    assert function["operations"]["linear"] == 2
    assert "const" not in function["operations"]
    assert function["unknown_operations"] == []
    # int4 [16, 32], uint2 [32, 16], and float16: scales, palette, biases
    assert found["weight_bytes"]["int4"] == 16 * 32 // 2
    assert found["weight_bytes"]["uint2"] == 32 * 16 // 4
    assert found["weight_bytes"]["float16"] == 2 * (16 * 2 + 16 + 32)


def test_profile(packages, capsys):
    found = document(capsys, packages["vision"], "--profile")["profile"]["main"]
    assert found["operations"]["conv"]["count"] == 1
    assert 0 < sum(v["seconds"] for v in found["operations"].values()) <= found["seconds"]
    assert found["nonfinite"] == []


def test_tables(packages, capsys):
    assert main(["mil", str(packages["decoder"]), "--profile"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("state_k: float16 [1, 4, 16]", "2 linear", "256 B int4", "operation count ms share"):
        assert text in shown


def test_a_pipeline(packages, capsys):
    found = document(capsys, packages["pipeline"], "--profile")
    assert list(found["functions"]) == ["stage 0, main", "stage 1, main"]
    (image,) = found["functions"]["stage 0, main"]["inputs"]
    assert (image["image"], image["default"]) == ("RGB", None)
    assert [v["default"] for v in found["functions"]["stage 1, main"]["inputs"]] == [None, 1.0]
    label, probabilities = found["functions"]["stage 1, main"]["outputs"]
    assert (label["dtype"], probabilities["dtype"]) == ("string", "float64")
    assert found["profile"]["main"]["operations"]["classify"]["count"] == 1
    assert main(["mil", str(packages["pipeline"])]) == 0
    assert "classLabel_probs: dictionary, string to float64" in " ".join(capsys.readouterr().out.split())


def test_a_package_that_cannot_be_run_is_shown(packages, capsys):
    spec = model.Model.FromString((packages["loop"] / MODEL).read_bytes())
    (function,) = spec.mlProgram.functions.values()
    function.block_specializations[function.opset].operations.add(type="quantum_gelu")
    (packages["loop"] / MODEL).write_bytes(spec.SerializeToString())
    found = document(capsys, packages["loop"])["functions"]["main"]
    assert found["unknown_operations"] == ["quantum_gelu"]
    assert found["operations"]["while_loop"] == 1
    assert found["operations"]["matmul"] == 1  # inside of the loop
    assert main(["mil", str(packages["loop"])]) == 0
    assert "unknown quantum_gelu" in " ".join(capsys.readouterr().out.split())
    assert main(["mil", str(packages["loop"]), "--profile"]) == 2
    assert "unknown type 'quantum_gelu'" in capsys.readouterr().err


def test_shared_weights_count_once(tmp_path, capsys):
    from coremltools.converters.mil import Builder as mb  # noqa: N813

    from tests.mil.programs import write_package

    table = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float16)

    def constant():
        made = mb.const(val=table)
        made.op.weight_id = "table"
        return made

    functions = {
        "embed": (lambda i: mb.gather(x=constant(), indices=i, axis=0), (np.zeros(1, np.int32),)),
        "head": (lambda x: mb.matmul(x=x, y=constant(), transpose_y=True), (np.zeros((1, 8), np.float16),)),
    }
    write_package(functions, tmp_path / "m.mlpackage")
    assert document(capsys, tmp_path / "m.mlpackage")["weight_bytes"] == {"float16": table.nbytes}


def test_looking_needs_neither_torch_nor_coremltools():
    """Importing coremltools takes seconds and prints a dozen lines; its file format alone does neither."""
    code = (
        "import sys, fastvlm_convert.mil.survey as s; "
        "sys.exit(bool({'torch', 'coremltools'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _modules(node):
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]


def test_the_interpreter_stands_alone():
    """It imports our errors and nothing else of ours."""
    folder = Path(mil_package.__file__).parent
    ours = {
        module
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
        if module.startswith("fastvlm_convert")
    }
    allowed = ("fastvlm_convert.errors", "fastvlm_convert.mil")
    assert {m for m in ours if not m.startswith(allowed)} == set()
