"""The script that CI runs on a Mac. Here the interpreter stands in for Core ML, which only a Mac has."""

import importlib.util
import json
import platform
from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert.pipeline import export
from tests.bundles import FP16, recipe
from tests.checkpoints import GOLDEN, LLAVA

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_on_mac.py"
STAGES = ["image_features", "inputs_embeds", "prefill_logits", "decode_logits"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_on_mac", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded(script, tmp_path_factory):
    """A bundle and what the interpreter computes of it."""
    folder = tmp_path_factory.mktemp("mac")
    export(GOLDEN / LLAVA / "checkpoint", folder / "bundle", recipe=recipe(FP16), targets=["coreml"])
    assert script.record(folder / "bundle", folder / "record.npz") == 0
    return folder / "bundle", folder / "record.npz"


def test_agreement_is_reported_by_stage(script, recorded, monkeypatch, capsys):
    monkeypatch.setattr(script, "has_core_ml", lambda: True)
    assert script.compare(*recorded) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "passed"
    assert list(report["stages"]) == STAGES
    values = [stage["sqnr_db"] for stage in report["stages"].values()]
    assert all(value is None or value > script.MIN_SQNR_DB for value in values)
    assert any(value is not None for value in values)  # device against exact: something is rounded


def test_a_difference_fails(script, recorded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "has_core_ml", lambda: True)
    bundle, record = recorded
    values = dict(np.load(record))
    values["out_decode_logits"] = -values["out_decode_logits"]
    np.savez(tmp_path / "other.npz", **values)
    assert script.compare(bundle, tmp_path / "other.npz") == 1
    report = json.loads(capsys.readouterr().out)
    failed = [name for name, stage in report["stages"].items() if stage["status"] == "failed"]
    assert (report["status"], failed) == ("failed", ["decode_logits"])


@pytest.mark.skipif(platform.system() == "Darwin", reason="there is Core ML")
def test_without_core_ml_nothing_is_claimed(script, recorded, capsys):
    assert script.compare(*recorded) == 2
    assert json.loads(capsys.readouterr().out)["status"] == "not_run"
