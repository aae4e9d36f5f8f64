"""A backend is one record and a line in three tables; nothing else knows that it exists."""

import ast
import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

import fastvlm_convert
from fastvlm_convert import targets
from fastvlm_convert.bundle.mlbom import MLBOM_FILE
from fastvlm_convert.bundle.model_card import CARD_FILE
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.main import main
from fastvlm_convert.errors import TargetError
from fastvlm_convert.exporters.backends import backend_of
from fastvlm_convert.generate import generate
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pictures import load_image
from fastvlm_convert.predict.export_plan import plan_export, predicted_files
from fastvlm_convert.runtime import sessions
from fastvlm_convert.runtime.loaded import load_bundle, load_reference
from fastvlm_convert.targets import BACKENDS, known_target
from fastvlm_convert.verification import executions
from tests.bundles import mixed_recipe, recipe, write_recipe
from tests.checkpoints import GOLDEN, LLAVA
from tests.toy.runtime import executions as toy_executions

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
PICTURE = GOLDEN / LLAVA / "image1.png"
PACKAGE = Path(fastvlm_convert.__file__).parent


@pytest.fixture
def toy(monkeypatch):
    """One line each."""
    monkeypatch.setitem(targets.BACKENDS, "toy", "tests.toy.exporter")
    monkeypatch.setitem(sessions.SESSIONS, "toy", "tests.toy.runtime")
    monkeypatch.setitem(executions.EXECUTIONS, "toy", toy_executions)


@pytest.fixture
def settings(tmp_path):
    """Integers and floats, but float32 arithmetic; answers are cut short.

    The reference reads a prompt and its answer in two passes, the toy in one: their sums round differently.
    """
    half = mixed_recipe()
    gates = {"quantizer_max_kl_nats": 9, "quantizer_min_top1": 0, "runtime_max_kl_nats": 0.0001}
    whole = recipe("fp32", gates={"max_new_tokens": 8, **gates})
    return replace(whole, name="mixed", quantize=half.quantize)


def run(capsys, *argv: object) -> dict:
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("toy")
def test_a_new_backend_does_all_that_the_others_do(tmp_path, capsys, settings):
    bundle, file = tmp_path / "bundle", write_recipe(settings, tmp_path / "mixed.yaml")
    planned = run(capsys, "plan", CHECKPOINT, "--recipe", file, "--target", "toy", "--target", "coreml")
    run(capsys, "export", CHECKPOINT, "--recipe", file, "--target", "toy", "-o", bundle)

    manifest = load_manifest(bundle)
    assert manifest.targets == ("toy",)
    written = {name: entry.size for name, entry in manifest.files.items()}
    both = {CARD_FILE, MLBOM_FILE}  # which describe both targets in the plan
    assert {n: size for n, size in planned["files"].items() if "coreml" not in n and n not in both} == {
        name: size for name, size in written.items() if name not in both
    }
    assert predicted_files(plan_export(open_checkpoint(CHECKPOINT), settings, ["toy"])) == written
    assert planned["kv_cache_bytes"]["toy"]["1024"] == 2 * planned["kv_cache_bytes"]["coreml"]["1024"]
    assert json.loads((bundle / "config.json").read_text())["toy"] is True

    answered = run(capsys, "run", bundle, PICTURE, "Describe the image.", "--max-new-tokens", 8)
    assert len(answered["token_ids"]) == 8
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(PICTURE.read_bytes())
    checks = run(capsys, "verify", bundle, "--reference", CHECKPOINT, "--images", pictures)["checks"]
    assert {check["status"] for check in checks} == {"passed"}
    assert {check["target"] for check in checks} == {"bundle", "weights", "toy"}


@pytest.mark.usefixtures("toy")
def test_a_new_backend_says_what_the_reference_says(tmp_path):
    bundle = tmp_path / "bundle"
    assert main(
        ["export", str(CHECKPOINT), "--recipe", "fp32", "--target", "toy", "-o", str(bundle)]
    ) == 0  # fmt: skip
    picture = load_image(PICTURE)
    said = [
        generate(model.session, model.prompt("Describe the image.", [picture]), (), 8).token_ids
        for model in (
            load_bundle(bundle, "toy"),
            load_reference(open_checkpoint(CHECKPOINT)),
        )
    ]
    assert said[0] == said[1]


@pytest.mark.usefixtures("toy")
def test_what_a_new_backend_refuses_is_refused(tmp_path):
    with pytest.raises(TargetError, match="toys compute in float32"):
        plan_export(open_checkpoint(CHECKPOINT), recipe("fp16"), ["onnx", "toy"])


def test_an_unknown_target_is_refused_with_those_there_are():
    for use in (known_target, backend_of):
        with pytest.raises(TargetError, match="unknown target 'tpu'") as caught:
            use("tpu")
        assert caught.value.hint == "targets: onnx, coreml, mlx"


@pytest.mark.parametrize("target", BACKENDS)
def test_a_record_is_complete(target):
    backend = backend_of(target)
    assert backend.title
    assert all(metadata.version(name) for name in backend.libraries)
    assert callable(backend.exporter())


def test_a_targets_name_is_typed_in_its_own_modules_and_the_tables_alone():
    """Beside a backend's own modules, those whose subject is what is known of each format name it."""
    about_formats = ("bench/imported/", "estimate/", "lint/", "verification/faults/")
    found: dict[str, int] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        own = [f"{folder}/{t}" for t in BACKENDS for folder in ("exporters", "runtime", "verification")]
        own += ["errors.py"]  # which names packages and the extras that bring them
        if not name.startswith((*own, *about_formats)):
            tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            typed = [node for node in tree if isinstance(node, ast.Constant) and node.value in BACKENDS]
            found |= {name: len(typed)} if typed else {}
    assert found == {
        "targets.py": 5,
        "bench/machine.py": 1,
        "bench/run.py": 1,
        "bundle/constants/contract.py": 2,
        "doctor/examine.py": 3,
        "runtime/sessions.py": 3,
        "serve/engines/choice.py": 1,
        "verification/executions.py": 3,
    }
