"""`--calibration`, and what becomes of a bundle that was calibrated."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm_convert.checkpoint.quantized_checkpoint import read_record
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.recipe import without_data
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.user_cache import cache_folder
from tests.bundles import edit_manifest, write_recipe
from tests.checkpoints import tree_state
from tests.cli.conftest import CHECKPOINT, IMAGE
from tests.planted import DEMO
from tests.quantization.calibrated import DECODER, INT8, calibrated_recipe

ONNX = ("--target", "onnx", "-o")
TABLE = QuantizeRule(("decoder.embed_tokens",), "int8", 16)  # ONNX needs blocks there
SETTINGS = calibrated_recipe(
    TABLE, QuantizeRule(("*.down_proj",), "float"), DECODER, INT8, num_samples=2, max_tokens=100
)


@pytest.fixture
def settings(tmp_path) -> Path:
    return write_recipe(SETTINGS, tmp_path / "calibrated.yaml")


@pytest.fixture
def questions(tmp_path, pictures) -> Path:
    """A file of two pictures, one with an answer."""
    first, second = json.loads((pictures / "questions.json").read_text())
    path = tmp_path / "questions.jsonl"
    lines = [{**first, "answer": "Red\u2028or blue."}, second]
    path.write_text(
        "\n\n".join(json.dumps({**e, "image": f"pictures/{e['image']}"}, ensure_ascii=False) for e in lines)
    )
    return path


def content(folder: Path) -> dict[str, str]:
    return {name: digest for name, (digest, _) in tree_state(folder).items()}


def test_pictures_of_ones_own(cli, tmp_path, settings, questions):
    arguments = ("quantize", CHECKPOINT, "--recipe", settings, "--calibration", questions, "-o")
    result = cli(*arguments, tmp_path / "a", "--json")
    assert result.code == 0
    score = result.document["answers"]
    assert score["status"] == "measured"
    assert score["kl_mean_nats"] > 0
    assert cli(*arguments, tmp_path / "b").code == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert cli("quantize", CHECKPOINT, "--recipe", settings, "-o", tmp_path / "c").code == 0
    a, c = (read_record(tmp_path / name).source.calibration for name in "ac")
    assert None not in (a, c)
    assert a != c
    assert content(tmp_path / "a") != content(tmp_path / "c")


def test_a_folder_and_the_score_in_words(cli, tmp_path, settings, pictures):
    result = cli("export", CHECKPOINT, "--recipe", settings, "--calibration", pictures, *ONNX, tmp_path / "a")
    assert result.code == 0
    (line,) = [line for line in result.out.splitlines() if line.startswith("answers: ")]
    assert "nats" in line
    assert re.search(r"of \d+ tokens of 1 calibration sample held out$", line)


@pytest.mark.parametrize("command", ["quantize", "export"])
def test_none_is_the_search(cli, tmp_path, settings, command):
    targets = ("--target", "onnx") if command == "export" else ()
    searched = write_recipe(without_data(SETTINGS), tmp_path / "search.yaml")
    arguments = (command, CHECKPOINT, *targets, "--recipe")
    result = cli(*arguments, settings, "--calibration", "none", "-o", tmp_path / "a")
    assert result.code == 0
    assert "answers: not measured, because no solver ran the model" in result.out
    assert cli(*arguments, searched, "-o", tmp_path / "b").code == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    made = (load_manifest if command == "export" else read_record)(tmp_path / "a")
    assert made.source.calibration is None
    assert {rule.solver for rule in made.recipe.quantize} == {"search"}


def test_the_bundle_of_a_calibrated_checkpoint_is_the_direct_one(cli, tmp_path, settings, questions):
    data = ("--recipe", settings, "--calibration", questions)
    assert cli("quantize", CHECKPOINT, *data, "-o", tmp_path / "q").code == 0
    assert cli("export", tmp_path / "q", *ONNX, tmp_path / "a").code == 0
    assert cli("export", CHECKPOINT, *data, *ONNX, tmp_path / "b").code == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert load_manifest(tmp_path / "a").source.calibration is not None


class TestRefused:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("gone", "there is no such folder of images"),
            ("gone.jsonl", "there is no such file"),
            ("text.txt", "neither a folder of images nor a .jsonl file"),
            ("empty.jsonl", "no entries here"),
            ("empty", "no images here (.png"),
            ("broken.jsonl", "line 2: not valid JSON"),
            ("number.jsonl", "entry 1: expected an object with 'image', 'question' and perhaps 'answer'"),
            ("mute.jsonl", "entry 1: expected an object with 'image', 'question' and perhaps 'answer'"),
            ("list.jsonl", "entry 1: expected an object with 'image', 'question' and perhaps 'answer'"),
            ("missing.jsonl", "there is no such image"),
            ("nul.jsonl", "there is no such image"),
            ("latin.jsonl", "cannot read"),
        ],
    )
    def test_data(self, cli, tmp_path, settings, data, message):
        entry = json.dumps({"image": str(IMAGE), "question": "What?"})
        files = {
            "text.txt": b"",
            "empty.jsonl": b"\n\n",
            "broken.jsonl": f"{entry}\n{{".encode(),
            "number.jsonl": b"1",
            "mute.jsonl": json.dumps({"image": str(IMAGE)}).encode(),
            "list.jsonl": json.dumps([{"image": str(IMAGE), "question": "What?"}]).encode(),
            "missing.jsonl": b'{"image": "gone.png", "question": "What?"}',
            "nul.jsonl": b'{"image": "a\\u0000.png", "question": "What?"}',
            "latin.jsonl": entry.replace("What", "Wh\u00e4t").encode("latin-1"),
        }
        folder = tmp_path / "data"
        (folder / "empty").mkdir(parents=True)
        for name, written in files.items():
            (folder / name).write_bytes(written)
        arguments = ("--recipe", settings, "--calibration", folder / data)
        result = cli("quantize", CHECKPOINT, *arguments, "-o", tmp_path / "out")
        assert (result.code, result.out) == (2, "")
        assert message in result.err
        assert data in result.err or data == "missing.jsonl" or data == "nul.jsonl"
        assert "Traceback" not in result.err
        assert not list(tmp_path.glob("out*"))

    def test_a_prompt_that_is_too_long(self, cli, tmp_path):
        short = replace(SETTINGS, calibration=replace(SETTINGS.calibration, max_tokens=20))
        path = write_recipe(short, tmp_path / "short.yaml")
        result = cli("export", CHECKPOINT, "--recipe", path, *ONNX, tmp_path / "out")
        assert result.code == 2
        assert "calibration.max_tokens is 20, but the prompt of sample 1 takes" in result.err
        assert "hint: raise calibration.max_tokens" in result.err
        assert not list(tmp_path.glob("out*"))

    def test_nothing_to_calibrate(self, cli, tmp_path, golden_quantized, pictures):
        data = ("--calibration", pictures, *ONNX, tmp_path / "out")
        floats = cli("export", CHECKPOINT, "--recipe", "fp32", *data)
        assert (floats.code, "no solver of recipe 'fp32' needs data" in floats.err) == (2, True)
        stored = cli("export", golden_quantized, *data)
        assert (stored.code, "the checkpoint is quantized already" in stored.err) == (2, True)
        assert "hint: leave --calibration out" in stored.err


class TestVerify:
    @pytest.fixture
    def bundle(self, cli, tmp_path, pictures) -> Path:
        scaled = replace(SETTINGS, calibration=replace(SETTINGS.calibration, awq=True))
        path = write_recipe(replace(scaled, name="scaled"), tmp_path / "scaled.yaml")
        data = ("--recipe", path, "--calibration", pictures)
        assert cli("export", CHECKPOINT, *data, *ONNX, tmp_path / "bundle").code == 0
        return tmp_path / "bundle"

    def test_where_it_was_made(self, cli, bundle, pictures):
        result = cli("verify", bundle, "--reference", CHECKPOINT, "--images", pictures, "--json")
        statuses = {(c["target"], c["status"]) for c in result.document["checks"] if c["target"] != "weights"}
        assert {status for _, status in statuses} == {"passed"}
        quantizer = [
            c for c in result.document["checks"] if c["target"] == "weights" and c["stage"] == "end_to_end"
        ]
        assert {c["metric"] for c in quantizer} == {"kl_mean_nats", "top1_agreement"}
        assert "not_run" not in {c["status"] for c in quantizer}

    def test_where_the_pictures_are_not_known(self, cli, bundle, pictures, tmp_path, monkeypatch):
        monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "elsewhere"))
        result = cli("verify", bundle, "--reference", CHECKPOINT, "--images", pictures)
        assert (result.code, result.out) == (2, "")
        assert "error: the layers were calibrated with data that is not at hand" in result.err
        assert "hint: give the quantized checkpoint as the reference" in result.err
        assert "Traceback" not in result.err

    def test_integers_that_another_machine_solved(
        self, cli, settings, pictures, questions, tmp_path, monkeypatch
    ):
        """As where nothing is in the cache, and other threads solve to other integers."""
        monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "own"))
        arguments = ("export", CHECKPOINT, "--recipe", settings, "--calibration")
        bundle = tmp_path / "bundle"
        assert cli(*arguments, pictures, *ONNX, bundle).code == 0
        (ours,) = cache_folder().glob("solved/*/*")
        assert cli(*arguments, questions, *ONNX, tmp_path / "other").code == 0
        (theirs,) = set(cache_folder().glob("solved/*/*")) - {ours}
        shutil.rmtree(ours)
        shutil.copytree(theirs, ours)
        result = cli("verify", bundle, "--reference", CHECKPOINT, "--images", pictures, "--json")
        assert result.code == 1
        causes = {found["target"]: found["cause"] for found in result.document["diagnoses"]}
        assert causes["onnx"] == "solved_elsewhere"

    def test_a_manifest_that_names_no_data(self, cli, bundle, pictures):
        edit_manifest(bundle, lambda m: m["source"].update(calibration=None))
        result = cli("verify", bundle, "--reference", CHECKPOINT, "--images", pictures)
        assert (result.code, "and none is recorded" in result.err) == (2, True)

    def test_the_quantized_checkpoint_serves_anywhere(self, cli, bundle, pictures, tmp_path, monkeypatch):
        data = ("--recipe", tmp_path / "scaled.yaml", "--calibration", pictures)
        assert cli("quantize", CHECKPOINT, *data, "-o", tmp_path / "q").code == 0
        monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "elsewhere"))
        result = cli("verify", bundle, "--reference", tmp_path / "q", "--images", pictures, "--json")
        assert {c["status"] for c in result.document["checks"] if c["target"] == "onnx"} == {"passed"}

    def test_generated_pictures_are_known_anywhere(self, cli, pictures, tmp_path, settings, monkeypatch):
        assert cli("export", CHECKPOINT, "--recipe", settings, *ONNX, tmp_path / "bundle").code == 0
        # float16 and random weights: what is judged here is whether the same integers are found.
        edit_manifest(tmp_path / "bundle", lambda m: m["recipe"]["gates"].update(min_sqnr_db=40))
        monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "elsewhere"))
        ask = ("verify", tmp_path / "bundle", "--reference", CHECKPOINT, "--images", pictures, "--json")
        checks = cli(*ask).document["checks"]
        assert {c["status"] for c in checks if c["target"] == "onnx"} == {"passed"}

    def test_the_demo(self, cli, tmp_path):
        rules = (replace(TABLE, block_size=128), replace(DECODER, block_size=32), INT8)
        recipe = replace(calibrated_recipe(*rules, num_samples=4, max_tokens=384), name="demo4")
        path = write_recipe(recipe, tmp_path / "demo4.yaml")
        assert cli("export", DEMO, "--recipe", path, *ONNX, tmp_path / "bundle").code == 0
        few = Path(shutil.copytree(DEMO / "check_images", tmp_path / "few"))
        listing = json.loads((few / "questions.json").read_text())
        (few / "questions.json").write_text(json.dumps(listing[:1]))
        result = cli("verify", tmp_path / "bundle", "--reference", DEMO, "--images", few, "--json")
        assert (result.code, result.document["status"]) == (0, "passed")
        quantizer = {c["metric"]: c["value"] for c in result.document["checks"] if c["target"] == "weights"}
        assert 0 < quantizer["kl_mean_nats"] < 0.01
