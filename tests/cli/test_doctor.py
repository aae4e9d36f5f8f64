"""`doctor` as a user calls it."""

import pytest

from tests.cli.conftest import CHECKPOINT
from tests.test_pipeline import run_without


def test_it_says_what_is_here(cli):
    result = cli("doctor", CHECKPOINT)
    assert result.code == 0
    assert result.out.splitlines()[-1].startswith("passed: 0 problems; ")
    for text in ("numpy", "export ONNX bundles", "run bundles on a phone", "android-int4", "memory"):
        assert text in result.out
    assert result.err == ""


def test_the_document(cli):
    document = cli("doctor", "--json").document
    assert (document["command"], document["status"], document["needs"]) == ("doctor", "passed", [])
    assert {library["name"] for library in document["libraries"]} >= {"numpy", "torch", "onnx", "coremltools"}
    assert document["machine"]["cpus"] >= 1
    assert {outcome["status"] for outcome in document["outcomes"]} <= {"passed", "not_run"}


@pytest.mark.slow
def test_it_runs_without_the_extras():
    done = run_without({"torch", "onnx", "onnxruntime", "coremltools"}, "doctor", "-q")
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.startswith(("passed: ", "failed: "))


def test_it_refuses_what_is_no_checkpoint(cli, tmp_path):
    result = cli("doctor", tmp_path / "nothing")
    assert result.code == 2
    assert "there is no such checkpoint" in result.err
