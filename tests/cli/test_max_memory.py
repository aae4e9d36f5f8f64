"""Conversions that need more memory than there may be are refused before they begin."""

import pytest

from fastvlm_convert.available_memory import available_memory_bytes
from fastvlm_convert.errors import MemoryLimitError
from fastvlm_convert.pipeline import export, plan
from fastvlm_convert.predict.memory import StageNeed, check_fits
from tests.planted import DEMO

EXPORT = ("export", DEMO, "--target", "onnx", "--recipe", "int4")
QUANTIZE = ("quantize", DEMO, "--recipe", "int4")
PLAN = ("plan", DEMO, "--target", "onnx", "--recipe", "int4")


@pytest.mark.parametrize("command", [EXPORT, QUANTIZE, PLAN], ids=lambda command: command[0])
def test_it_says_which_stage_needs_how_much_and_what_helps(cli, tmp_path, command):
    output = () if command is PLAN else ("-o", tmp_path / "out")
    result = cli(*command, *output, "--max-memory", "500MB", "--json")
    error = result.document["error"]
    assert (result.code, error["code"], error["where"]) == (2, "memory", "--max-memory")
    assert error["message"].startswith("the stage 'layers' needs about ")
    assert "500 MB is allowed" in error["message"]
    assert "calibration.num_samples" in error["hint"]
    assert "--calibration none" in error["hint"]
    assert list(tmp_path.iterdir()) == []


def test_no_stage_has_begun(tmp_path):
    seen: list[str] = []
    with pytest.raises(MemoryLimitError):
        export(
            DEMO, tmp_path / "out", recipe="int4", targets="onnx", max_memory=10**8,
            on_progress=lambda stage, share: seen.append(stage),
        )  # fmt: skip
    assert seen == []


def test_what_it_advises_helps(cli, tmp_path):
    done = cli(*EXPORT, "-o", tmp_path / "out", "--calibration", "none", "--max-memory", "500MB")
    assert done.code == 0


def test_without_data_the_target_is_named(cli, tmp_path):
    command = ("export", DEMO, "--target", "coreml", "--recipe", "fp16", "-o", tmp_path / "out")
    result = cli(*command, "--max-memory", "100MB")
    assert result.code == 2
    assert "the stage 'coreml' needs about" in result.err
    assert "another target" in result.err


def test_what_is_allowed_is_what_plan_says():
    needed = plan(DEMO, recipe="int4", targets="onnx").peak_memory_bytes
    plan(DEMO, recipe="int4", targets="onnx", max_memory=needed)
    with pytest.raises(MemoryLimitError):
        plan(DEMO, recipe="int4", targets="onnx", max_memory=needed - 1)


@pytest.mark.skipif(available_memory_bytes() is None, reason="the system does not tell what is free")
def test_what_is_free_is_the_limit():
    check_fits([StageNeed("onnx", 10**6)], None)
    with pytest.raises(MemoryLimitError, match="is free"):
        check_fits([StageNeed("onnx", 10**6), StageNeed("coreml", 1 << 50)], None)


@pytest.mark.parametrize("size", ["much", "-1GB", "0", "4XB"])
def test_what_is_no_size(cli, size):
    result = cli(*PLAN, "--max-memory", size, "--json")
    assert (result.code, result.document["error"]["code"]) == (2, "usage")
    assert "4GB" in result.document["error"]["message"]
