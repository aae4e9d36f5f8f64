"""Unmodified transformers.js in headless Chromium gives the answers of `fastvlm-convert run`."""

from dataclasses import replace

import pytest

from fastvlm_convert.recipe import load_recipe
from tests.bundles import recipe
from tests.clients.browser import BUILDS, ask_browser, find_chromium, load_in_browser
from tests.clients.cases import make_bundle, tasks_of
from tests.clients.transformers_js import ask_ours

WEB_RECIPES = ("web-q4f16", "web-small")

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
    # WebAssembly has no kernel that rounds activations to int8.
    expected = {"error": None, "answers": ask_ours(bundle, tasks, precision="exact")}
    assert [{key: result[key] for key in expected} for result in results] == [expected] * len(BUILDS)


def test_webgpu_answers_as_we_do_in_float32(tmp_path):
    """What the software adapter can hold, which is no proof about real graphics processors.

    On the golden checkpoints, with heads of 16, its GroupQueryAttention gives other tokens.
    """
    settings = replace(recipe("fp32", onnx={"shared_table": False}), name="fp32-web")
    bundle = make_bundle("demo", settings, tmp_path)
    tasks = tasks_of("demo")[:2]  # it is slow
    (result,) = ask_browser(bundle, [load_in_browser("webgpu", device="webgpu")], tasks, tmp_path, gpu=True)
    assert (result["error"], result["answers"]) == (None, ask_ours(bundle, tasks))


@pytest.mark.parametrize("name", WEB_RECIPES)
def test_webassembly_answers_the_trained_model_as_run_does(name, tmp_path):
    """Int8 activations change no token there."""
    bundle = make_bundle("demo", load_recipe(name), tmp_path)
    tasks = tasks_of("demo")
    assert ask_ours(bundle, tasks) == ask_ours(bundle, tasks, precision="exact")


@pytest.mark.parametrize("name", WEB_RECIPES)
def test_webgpu_answers_as_we_do(name, tmp_path):
    bundle = make_bundle("demo", load_recipe(name), tmp_path)
    tasks = tasks_of("demo")[:2]
    (result,) = ask_browser(bundle, [load_in_browser("webgpu", device="webgpu")], tasks, tmp_path, gpu=True)
    if "shader-f16" not in result["features"]:
        pytest.skip("this Chromium's software adapter has no shader-f16, which the float16 decoder needs")
    assert (result["error"], result["answers"]) == (None, ask_ours(bundle, tasks))
