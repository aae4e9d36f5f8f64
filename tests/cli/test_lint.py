"""`lint` as a user calls it: exit codes, formats, explanations."""

import json
import shutil
import xml.etree.ElementTree as ET

import pytest

from fastvlm_convert.lint.table import RULES
from fastvlm_convert.pipeline import export
from tests.bundles import recipe, write_recipe
from tests.cli.conftest import CHECKPOINT

FUSED = "coreml-fused-attention"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lint") / "bundle"
    export(CHECKPOINT, folder, recipe=recipe("fp16"), targets=["coreml"])
    return folder


def test_an_error_fails_a_warning_does_not(cli, bundle):
    for options, code, status, severity in (
        (("--ios", "26"), 1, "failed", "error"),
        ((), 0, "passed", "warning"),
        (("--strict",), 1, "failed", "warning"),
        (("--ios", "18", "--compute-units", "cpuAndGPU"), 0, "passed", None),
    ):
        result = cli("lint", bundle, *options)
        assert result.code == code, options
        assert result.out.splitlines()[-1].startswith(f"{status}: ")
        lines = [line for line in result.out.splitlines() if FUSED in line]
        assert all(line.startswith(severity) for line in lines)
        assert bool(lines) == (severity is not None)


def test_the_document_says_everything(cli, bundle):
    document = cli("lint", bundle, "--ios", "26.1", "--json").document
    assert (document["command"], document["status"], document["strict"]) == ("lint", "failed", False)
    assert document["platform"] == {
        "ios": [26, 1], "android": None, "onnxruntime": None, "provider": None, "compute_units": None,
    }  # fmt: skip
    told = {outcome["id"] for outcome in document["outcomes"]}
    assert told | set(document["not_applicable"]) == set(RULES)
    fused = [outcome for outcome in document["outcomes"] if outcome["id"] == FUSED]
    assert {(o["severity"], o["status"]) for o in fused} == {("error", "failed")}
    assert cli("lint", bundle, "--ios", "26.1", "--output-format", "json").document == document


def test_github_and_junit(cli, bundle):
    result = cli("lint", bundle, "--ios", "26", "--output-format", "github")
    assert result.code == 1
    assert result.out.startswith(f"::error title={FUSED}::coreml/")
    for options, failures in (((), 0), (("--strict",), 4), (("--ios", "26"), 2)):
        result = cli("lint", bundle, "--output-format", "junit", *options)
        suite = ET.fromstring(result.out).find("testsuite")
        assert (suite.get("name"), int(suite.get("failures"))) == ("lint", failures)
        assert result.code == (1 if failures else 0)


def test_quiet_leaves_the_verdict(cli, bundle):
    result = cli("lint", bundle, "-q")
    assert (result.out.count("\n"), result.err) == (1, "")
    assert result.out.startswith("passed: 0 errors, 4 warnings, 1 note; ")


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_explained(cli, rule):
    document = cli("lint", "--explain", rule, "--json").document
    assert document["id"] == rule
    assert document["source"] == RULES[rule].source
    text = cli("lint", "--explain", rule).out
    assert RULES[rule].source in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either a BUNDLE or --explain"),
        (("app", "--explain", FUSED), "either a BUNDLE or --explain"),
        (("--explain", "coreml-fused-atention"), f"did you mean '{FUSED}'"),
        (("--explain", FUSED, "--output-format", "junit"), "has no junit form"),
        (("app", "--ios", "new"), "--ios is 'new'"),
        (("app", "--onnxruntime", "1.2.3.4"), "--onnxruntime is '1.2.3.4'"),
        (("app", "--execution-provider", "xnpack"), "did you mean 'xnnpack'"),
        (("app", "--compute-units", "gpu"), "choose one of: all, cpuAndNeuralEngine"),
        (("no/such/bundle",), "there is no such bundle"),
    ],
)
def test_what_it_cannot_take(cli, arguments, message):
    result = cli("lint", *arguments)
    assert result.code == 2
    assert message in result.err


def test_export_prints_what_it_finds(cli, tmp_path):
    settings = write_recipe(recipe("fp16", common={"max_context_length": 4096}), tmp_path / "long.yaml")
    arguments = ("export", CHECKPOINT, "--target", "coreml", "--recipe", settings, "-o", tmp_path / "b")
    result = cli(*arguments)
    assert result.code == 0
    lines = [line for line in result.err.splitlines() if "--explain" in line]
    assert all(line.startswith("warning: ") for line in lines)
    assert {line.split()[-1] for line in lines} == {
        FUSED, "coreml-ane-state-width", "context-beyond-training",
    }  # fmt: skip
    shutil.rmtree(tmp_path / "b")
    document = json.loads(cli(*arguments, "--json").out)
    assert {finding["id"] for finding in document["findings"]} >= {FUSED, "context-beyond-training"}
    assert document["status"] == "passed"
