"""The whole path on the shipped demo checkpoint, by the commands of the front page."""

import json
from pathlib import Path

import pytest

from fastvlm_convert.cli.main import main

DEMO = Path(__file__).parents[2] / "checkpoints" / "fastvlm-demo"
PICTURES = DEMO / "check_images"
GATES = {"fp32": 100, "fp16": 50}


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    capsys.readouterr()
    code = main([*map(str, argv), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert code == 0, document
    return document


@pytest.fixture(scope="module", params=GATES)
def bundle(request, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / request.param
    assert main(["export", str(DEMO), "--target", "onnx", "--recipe", request.param, "-o", str(output)]) == 0
    return output


@pytest.mark.slow
def test_it_is_verified_by_default(bundle, capsys):
    document = run(capsys, "verify", bundle, "--reference", DEMO)
    assert (document["status"], document["questions"]) == ("passed", 36)
    values = [c["value"] for c in document["checks"] if c["metric"] == "sqnr_db" and c["value"] is not None]
    assert min(values) >= GATES[bundle.name]
    (text,) = (c for c in document["checks"] if c["stage"] == "greedy_text")
    assert text["exact"] is True


def test_it_answers_as_the_checkpoint_does(bundle, capsys):
    question = ("Describe the image.", "--max-new-tokens", 48)
    for picture in sorted(PICTURES.glob("*.png"))[:3]:
        ours, reference = (run(capsys, "run", m, picture, *question) for m in (bundle, DEMO))
        assert ours["token_ids"] == reference["token_ids"]
        assert ours["text"]


def test_its_license_comes_along(bundle):
    assert (bundle / "LICENSE").read_bytes() == (DEMO / "LICENSE").read_bytes()
    assert "fastvlm-convert" in (bundle / "NOTICE").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "int4", "int4-small", "ios-ane"])
def test_the_targets_of_every_recipe_are_verified(recipe, tmp_path, capsys):
    targets = ["--target", "coreml"] if recipe == "ios-ane" else ["--target", "onnx", "--target", "coreml"]
    output = tmp_path / recipe
    assert main(["export", str(DEMO), *targets, "--recipe", recipe, "-o", str(output)]) == 0
    document = run(capsys, "verify", output, "--reference", DEMO)
    assert document["status"] == "passed"
    executed = {check["executed_by"] for check in document["checks"]}
    assert "interpreter (exact)" in executed
    assert ("onnx" in targets) == any(by and by.startswith("onnxruntime") for by in executed)
