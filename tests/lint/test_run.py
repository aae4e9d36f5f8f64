"""All rules together: shipped recipes, damaged bundles, missing libraries, and the page that lists them."""

import re
from pathlib import Path

import pytest

from fastvlm_convert.errors import BundleError
from fastvlm_convert.lint.platform import Platform
from fastvlm_convert.lint.providers import RUN_ON_CPU
from fastvlm_convert.lint.run import lint, read_facts
from fastvlm_convert.lint.table import RULES
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import load_recipe, shipped_recipes, without_data
from tests.bundles import edit_manifest, recipe
from tests.lint.conftest import edit_graph, integers
from tests.planted import DEMO
from tests.test_pipeline import run_without

PAGE = Path(__file__).parents[2] / "docs" / "lint.md"
PHONE_26 = Platform(ios=(26,), compute_units="cpuAndGPU")
# What each recipe was made for; those without a name are for both targets, anywhere.
INTENDED = {
    "ios-int4": ("coreml", PHONE_26),
    "ios-ane": ("coreml", Platform(ios=(26,), compute_units="cpuAndNeuralEngine")),
    "android-int4": ("onnx", Platform(android=(14,), onnxruntime=(1, 22), provider="cpu")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(shipped_recipes()) - {"int8-static", "int4-static"}))  # need data
def test_no_shipped_recipe_has_an_error_where_it_is_meant_for(name, tmp_path):
    web = ("onnx", Platform(onnxruntime=(1, 22), provider="webgpu"))
    target, platform = INTENDED.get(name, web if name.startswith("web-") else (None, Platform()))
    targets = None if target is None else [target]
    export(DEMO, tmp_path / "bundle", recipe=without_data(load_recipe(name)), targets=targets)
    result = lint(tmp_path / "bundle", platform)
    assert [f for f in result.findings if f.severity == "error"] == []
    assert result.status() == "passed"
    assert all(outcome.status != "not_run" for outcome in result.outcomes)
    graphs = read_facts(tmp_path / "bundle").graphs
    assert {node.full_op for graph in graphs for node in graph.nodes} <= RUN_ON_CPU


def test_every_rule_is_told_of_once(make):
    result = lint(make("onnx", recipe("fp16")))
    told = {outcome.id for outcome in result.outcomes}
    assert told | set(result.not_applicable) == set(RULES)
    assert not told & set(result.not_applicable)


def test_a_warning_fails_if_that_is_asked_for(make):
    result = lint(make("onnx", integers()))
    assert (result.status(), result.status(strict=True)) == ("passed", "failed")


def test_what_cannot_be_read_is_not_run_and_never_passed(make):
    done = run_without({"onnx"}, "lint", make("onnx", recipe("fp16")), "--json")
    assert done.returncode == 2
    assert '"status": "not_run"' in done.stdout
    assert "onnx, which is not installed" in done.stdout


@pytest.mark.parametrize(
    ("key", "value"), [("location", "../../elsewhere"), ("offset", "-1"), ("length", "99999999999")]
)
def test_a_weight_outside_the_bundles_files_is_refused(make, copy, key, value):
    bundle = copy(make("onnx", recipe("fp16")))

    def plant(model):
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    edit_graph(bundle, "vision", plant)
    with pytest.raises(BundleError):
        lint(bundle)


def test_a_damaged_graph_is_refused(make, copy):
    bundle = copy(make("onnx", recipe("fp16")))
    name = next((bundle / "onnx").glob("vision*.onnx"))
    name.write_bytes(b"\xff" * 100)
    edit_manifest(bundle, lambda m: m["files"][f"onnx/{name.name}"].update(size=100))
    with pytest.raises(BundleError, match="cannot read the graph"):
        lint(bundle)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_is_a_line_with_a_source(rule):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", rule.id)
    assert rule.source.startswith("https://")
    for text in (rule.reason, rule.advice, rule.scope):
        assert "\n" not in text
        assert 0 < len(text) <= 170


def test_the_page_lists_every_rule_as_it_is():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("| [report](") == len(RULES)
    for rule in RULES.values():
        row = f"| `{rule.id}` | {rule.severity} | {rule.scope} | {rule.reason} | [report]({rule.source}) |"
        assert row in page
