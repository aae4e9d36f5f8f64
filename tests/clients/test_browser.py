"""Unmodified transformers.js in headless Chromium gives the answers of `fastvlm-convert run`."""

import pytest

from fastvlm_convert.recipe import load_recipe
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
