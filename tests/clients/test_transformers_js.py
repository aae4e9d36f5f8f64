"""Unmodified transformers.js in Node opens every ONNX bundle and answers as `fastvlm-convert run` does."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.predict.recipe_sizes import describe
from fastvlm_convert.recipe import load_recipe, shipped_recipes
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.runtime.loaded import load_bundle
from tests.bundles import recipe
from tests.clients.cases import CHECKPOINTS, DEMO, make_bundle, tasks_of
from tests.clients.node import PACKAGES, need_packages
from tests.clients.transformers_js import Task, ask_ours, ask_transformers_js
from tests.commands import ROOT

WEB = ROOT / "docs" / "web.md"
DTYPES = dict(re.findall(r'^\| `([\w-]+)` \| `"(\w+)"` \|', WEB.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.fixture(autouse=True)
def _clients() -> None:
    need_packages()


def check_answers(bundle: Path, checkpoint: str, options: list[dict], folder: Path) -> None:
    """See that every way to load a bundle gives our answers."""
    tasks = tasks_of(checkpoint)
    ours = ask_ours(bundle, tasks)
    assert all(ours)
    theirs = ask_transformers_js(bundle.parent, [(bundle.name, o) for o in options], tasks, folder)
    for option, answers in zip(options, theirs, strict=True):
        assert answers == ours, option


def test_the_table_has_every_recipe_for_onnx():
    facts = {name: describe(load_recipe(name)).targets["onnx"] for name in shipped_recipes()}
    assert set(DTYPES) == {name for name, fact in facts.items() if fact.refused is None}


@pytest.mark.parametrize("name", ["int4"])
def test_a_recipe_answers_as_we_do(name, tmp_path):
    check_answers(
        make_bundle("demo", load_recipe(name), tmp_path), "demo", [{"dtype": DTYPES[name]}], tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", DTYPES)
def test_every_recipe_answers_as_we_do_in_every_spelling(name, checkpoint, tmp_path):
    bundle = make_bundle(checkpoint, load_recipe(name), tmp_path)
    check_answers(bundle, checkpoint, [{}, {"dtype": "auto"}, {"dtype": DTYPES[name]}], tmp_path)


MIX = {"embed_tokens": "fp16", "vision_encoder": "fp16", "decoder_model_merged": "q4"}


def test_a_mix_opens_the_files_it_names(tmp_path):
    """The mix that public code uses: an int4 decoder that computes in float32 beside float16 files."""
    base = recipe("fp16", decoder={"storage": "float16", "compute": "float32"}, onnx={"shared_table": False})
    rules = (
        QuantizeRule(("decoder.layers.*", "decoder.lm_head"), "int4", 32),
        QuantizeRule(("*",), "float"),
    )
    bundle = make_bundle("demo", replace(base, name="mix", quantize=rules), tmp_path)
    names = {path.name for path in (bundle / "onnx").glob("*.onnx")}
    assert names >= {"embed_tokens_fp16.onnx", "vision_encoder_fp16.onnx", "decoder_model_merged_q4.onnx"}
    check_answers(bundle, "demo", [{}, {"dtype": MIX}], tmp_path)


def test_a_square_of_the_right_size_needs_no_help(tmp_path):
    bundle = make_bundle("demo", load_recipe("fp16"), tmp_path)
    size = load_manifest(bundle).contract.image_size
    Image.open(DEMO / "check_images" / "00.png").resize((size, size)).save(tmp_path / "square.png")
    tasks = [Task(tmp_path / "square.png", "Describe the image.")]
    assert ask_transformers_js(tmp_path, [(bundle.name, {})], tasks, tmp_path) == [ask_ours(bundle, tasks)]


def test_a_dtype_that_is_not_in_the_bundle_is_said(tmp_path):
    bundle = make_bundle("demo", load_recipe("fp16"), tmp_path)
    (error,) = ask_transformers_js(tmp_path, [(bundle.name, {"dtype": "q4"})], tasks_of("demo"), tmp_path)
    assert "_q4.onnx" in error
    assert "not found" in error


def test_it_answers_questions_about_no_picture(tmp_path):
    bundle = make_bundle("demo", load_recipe("fp32"), tmp_path)
    tasks = [Task(None, "What is a circle?")]
    assert ask_transformers_js(tmp_path, [(bundle.name, {})], tasks, tmp_path) == [ask_ours(bundle, tasks)]


def test_the_script_of_the_guide_answers_as_we_do(tmp_path):
    """docs/web.md's own lines, in a folder as its reader has it."""
    bundle = make_bundle("demo", replace(load_recipe("web-q4f16"), name="web-bundle"), tmp_path)
    picture = DEMO / "check_images" / "00.png"
    shutil.copy(picture, tmp_path / "photo.jpg")
    (tmp_path / "node_modules").symlink_to(PACKAGES)
    (script,) = re.findall(r"^```js\n(.*?)^```$", WEB.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "ask.mjs").write_text(script)
    done = subprocess.run(["node", "ask.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "".join(load_bundle(bundle).ask(picture, "Describe the image."))
