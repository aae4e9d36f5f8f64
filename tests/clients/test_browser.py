"""Unmodified transformers.js in headless Chromium gives the answers of `fastvlm-convert run`."""

from dataclasses import replace

import pytest

from fastvlm_convert.recipe import load_recipe
from tests.bundles import recipe
from tests.clients.browser import BUILDS, ask_browser, find_chromium, load_in_browser
from tests.clients.cases import make_bundle, tasks_of
from tests.clients.transformers_js import ask_ours

WEB_RECIPES = ("web-q4f16",)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _browser() -> None:
    find_chromium()


@pytest.mark.parametrize("checkpoint", ["demo", "tiny-llava", "tiny-hf"])
@pytest.mark.parametrize("name", WEB_RECIPES)
def test_both_builds_of_webassembly_answer_as_we_do(name, checkpoint, tmp_path):
    bundle = make_bundle(checkpoint, load_recipe(name), tmp_path)
    tasks = tasks_of(checkpoint)
    loads = [load_in_browser(build, device="wasm") for build in BUILDS]
    results = ask_browser(bundle, loads, tasks, tmp_path)
    expected = {"error": None, "answers": ask_ours(bundle, tasks)}
    assert [{key: result[key] for key in expected} for result in results] == [expected] * len(BUILDS)


@pytest.mark.parametrize("checkpoint", ["demo", "tiny-llava", "tiny-hf"])
def test_webgpu_answers_as_we_do_in_float32(checkpoint, tmp_path):
    """What the software adapter can run: it is no proof about real graphics processors."""
    settings = replace(recipe("fp32", onnx={"shared_table": False}), name="fp32-web")
    bundle = make_bundle(checkpoint, settings, tmp_path)
    tasks = tasks_of(checkpoint)[:2]  # it is slow
    (result,) = ask_browser(bundle, [load_in_browser("webgpu", device="webgpu")], tasks, tmp_path, gpu=True)
    assert (result["error"], result["answers"]) == (None, ask_ours(bundle, tasks))


@pytest.mark.parametrize("name", WEB_RECIPES)
def test_webgpu_answers_as_we_do(name, tmp_path):
    bundle = make_bundle("demo", load_recipe(name), tmp_path)
    tasks = tasks_of("demo")[:2]
    (result,) = ask_browser(bundle, [load_in_browser("webgpu", device="webgpu")], tasks, tmp_path, gpu=True)
    if "shader-f16" not in result["features"]:
        pytest.skip("this Chromium's software adapter has no shader-f16, which the float16 decoder needs")
    assert (result["error"], result["answers"]) == (None, ask_ours(bundle, tasks))
