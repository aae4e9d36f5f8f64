import json
from dataclasses import asdict

import pytest

from fastvlm_convert.verification.bundle import VerifyResult
from fastvlm_convert.verification.check import at_least, equal, not_run

RUNS = "onnxruntime 1.0"


def check(value):
    return at_least("onnx", "decode_logits", "sqnr_db", value, 50.0, RUNS)


@pytest.mark.parametrize("value", [50.0, 50.1, 1000.0])
def test_what_reaches_the_threshold_passes(value):
    assert (check(value).status, check(value).value, check(value).exact) == ("passed", value, False)
    assert check(value).reason is None


@pytest.mark.parametrize("value", [49.9, 0.0, -20.0])
def test_what_does_not_fails_and_says_why(value):
    assert (check(value).status, check(value).value) == ("failed", value)
    assert check(value).reason == f"{value:.1f} is below 50"


def test_equality_passes_and_is_no_number():
    assert (check(None).status, check(None).value, check(None).exact) == ("passed", None, True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_fails_and_is_no_number(value):
    found = check(value)
    assert (found.status, found.value, found.exact) == ("failed", None, False)
    assert found.reason == "the outputs hold NaN or infinity"
    json.dumps(asdict(found), allow_nan=False)


def test_equal_counts_differences():
    same, other = (equal("onnx", "greedy_text", "token_ids", n, "2 differ", RUNS) for n in (0, 2))
    assert (same.status, same.value, same.exact, same.reason) == ("passed", None, True, None)
    assert (other.status, other.value, other.exact, other.reason) == ("failed", 2.0, False, "2 differ")


def test_not_run_is_neither():
    found = not_run("onnx", "greedy_text", "token_ids", "no runtime")
    assert (found.status, found.reason, found.exact) == ("not_run", "no runtime", False)
    assert (found.value, found.executed_by) == (None, None)


def test_status_of_the_whole():
    passed, failed, absent = check(60.0), check(40.0), not_run("onnx", "s", "m", "r")
    assert VerifyResult((passed,), (), (), 1, "").status == "passed"
    assert VerifyResult((passed, absent), (), (), 1, "").status == "not_run"
    assert VerifyResult((passed, absent, failed), (), (), 1, "").status == "failed"
