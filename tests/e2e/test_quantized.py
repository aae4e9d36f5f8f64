"""A quantized checkpoint of the demo takes the place of the float one."""

import json
from pathlib import Path

import pytest

from fastvlm_convert.cli.main import main
from tests.checkpoints import tree_state
from tests.e2e.test_demo import DEMO, PICTURES, run

TARGETS = ("--target", "onnx", "--target", "coreml")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "quantized"
    assert main(["quantize", str(DEMO), "--recipe", "int4", "-o", str(output)]) == 0
    return output


def content(folder: Path) -> dict[str, str]:
    return {name: digest for name, (digest, _) in tree_state(folder).items()}


def test_it_is_what_the_recipe_says(quantized, capsys):
    facts = run(capsys, "inspect", quantized)["quantized"]
    assert facts["recipe"]["name"] == "int4"
    components = {c["name"]: c for c in facts["components"]}
    assert components["decoder"]["schemes"] == {"int4 block 64, asymmetric": 28}
    assert components["decoder"]["bits_per_weight"] == 4 + (16 + 4) / 64
    assert components["vision"]["schemes"] == {"int8 channel": 42}
    assert components["embedding"]["schemes"] == {"int8 block 128": 1}
    size = (quantized / "model.safetensors").stat().st_size
    assert size < 0.4 * (DEMO / "model.safetensors").stat().st_size
    assert components["total"]["stored_bytes"] < size < 1.02 * components["total"]["stored_bytes"]


def test_it_answers_as_the_float_one_does(quantized, capsys):
    for picture in sorted(PICTURES.glob("*.png"))[:2]:
        ask = (picture, "Describe the image.", "--max-new-tokens", 48)
        assert run(capsys, "run", quantized, *ask)["text"] == run(capsys, "run", DEMO, *ask)["text"]


@pytest.mark.slow
def test_its_bundle_is_the_direct_one_and_is_verified(quantized, tmp_path, capsys):
    bundle, direct = tmp_path / "bundle", tmp_path / "direct"
    run(capsys, "export", quantized, *TARGETS, "-o", bundle)
    run(capsys, "export", DEMO, "--recipe", "int4", *TARGETS, "-o", direct)
    assert content(bundle) == content(direct)
    assert run(capsys, "verify", bundle, "--reference", DEMO)["status"] == "passed"
    assert main(["verify", str(bundle), "--reference", str(quantized), "--json"]) == 2
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {c["target"] for c in checks if c["status"] == "not_run"} == {"weights"}
    assert {c["status"] for c in checks if c["target"] != "weights"} == {"passed"}
