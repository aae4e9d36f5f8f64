import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from fastvlm_convert.questions import QuestionSet, hard_questions
from fastvlm_convert.runtime import onnx_session
from tests.bundles import copy_bundle
from tests.checkpoints import edit_tensors, read_tensors
from tests.cli.conftest import CHECKPOINT

CHECK_KEYS = {
    "target", "stage", "metric", "value", "exact", "threshold", "status", "reason", "executed_by",
}  # fmt: skip


@pytest.fixture
def bundle(fp32_bundle, tmp_path):
    return copy_bundle(fp32_bundle, tmp_path)


def verify(cli, bundle, pictures, *more, reference=CHECKPOINT):
    return cli("verify", bundle, "--reference", reference, "--images", pictures, *more)


def test_passed_is_exit_code_0(cli, fp32_bundle, pictures):
    result = verify(cli, fp32_bundle, pictures)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "passed on 2 images"
    assert [line.split()[:2] for line in lines[1:3]] == [["passed", "bundle"], ["passed", "onnx"]]
    assert "0 of 2 answers differ; KL " in lines[2]
    assert lines[3] == "no interval: 2 pictures, and fewer than 30 say too little about others"
    assert lines[4].startswith("nearest to its gate: onnx ")
    assert ", at least 100 (" in lines[4]
    assert len(lines) == 5


def test_the_tables_come_on_request(cli, fp32_bundle, pictures):
    result = verify(cli, fp32_bundle, pictures, "--details")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0] == "passed on 2 images"
    assert "greedy_text" in result.out
    assert "failed" not in result.out
    assert result.out.count("onnxruntime ") >= 6
    assert "cosine" in result.out


def test_document(cli, fp32_bundle, pictures):
    result = verify(cli, fp32_bundle, pictures, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert (document["schema_version"], document["command"], document["status"]) == (1, "verify", "passed")
    assert document["bundle"] == str(fp32_bundle)
    assert document["reference"] == str(CHECKPOINT)
    assert (document["questions"], document["pictures"]) == (2, 2)
    assert [a["picture"] for a in document["answers"]] == ["image0.png", "image1.png"]
    assert all(a["bundle_text"] == a["reference_text"] != "" for a in document["answers"])
    assert {layer["target"] for layer in document["layers"]} == {"onnx"}
    assert min(layer["sqnr_db"] for layer in document["layers"] if layer["reason"] is None) > 90
    assert (document["first_divergence"], document["diagnoses"]) == ({"onnx": None}, [])
    assert 0 < document["nearest"]["share_used"] < 1
    assert document["warnings"] == []
    assert all(set(check) == CHECK_KEYS for check in document["checks"])
    values = {(c["stage"], c["metric"]): c["value"] for c in document["checks"]}
    assert values["image_features", "sqnr_db"] >= 100
    assert values["greedy_text", "token_ids"] is None
    measured = {(m["stage"], m["metric"]) for m in document["measurements"]}
    assert {("decode_logits", "kl_p99_nats"), ("image_features", "psnr_db")} <= measured


def test_a_failed_gate_is_exit_code_1(cli, bundle, pictures):
    path = bundle / "onnx" / "vision_encoder.onnx_data"
    content = np.fromfile(path, np.uint8)
    content[-20_000:] = 0
    content.tofile(path)
    result = verify(cli, bundle, pictures)
    assert result.code == 1
    assert "failed bundle files: changed: onnx/vision_encoder.onnx_data" in result.err
    assert "failed onnx image_features (onnxruntime " in result.err
    lines = result.out.splitlines()
    assert lines[0] == "failed on 2 images"
    assert "onnx first breaks at image_features (sqnr_db)" in lines
    assert any(line.startswith("farthest beyond its gate: onnx ") for line in lines)
    (cause,) = (line for line in lines if line.startswith("  likely cause: layer_weights: "))
    (parted,) = (line for line in lines if line.startswith("  first operation that parts: "))
    assert parted.split()[4].rstrip(",") in cause
    document = verify(cli, bundle, pictures, "--json").document
    assert document["status"] == "failed"
    reasons = {c["stage"]: c["reason"] for c in document["checks"] if c["status"] == "failed"}
    assert reasons["image_features"].endswith("is below 100")


def test_another_reference_fails_with_a_warning(cli, fp32_bundle, llava, pictures):
    tensors = read_tensors(llava)
    edit_tensors(llava, {"model.norm.weight": tensors["model.norm.weight"] * 1.01})
    result = verify(cli, fp32_bundle, pictures, reference=llava)
    assert result.code == 1
    assert "warning: the bundle was made from other files than this reference" in result.err


def test_not_run_is_exit_code_2(cli, fp32_bundle, pictures, monkeypatch):
    monkeypatch.delitem(sys.modules, "fastvlm_convert.runtime.onnx_session", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = verify(cli, fp32_bundle, pictures)
    assert result.code == 2
    assert "not_run onnx greedy_text: running ONNX bundles needs onnxruntime" in result.err
    assert result.out.splitlines()[0] == "not_run on 2 images"
    assert verify(cli, fp32_bundle, pictures, "--json").document["status"] == "not_run"


def test_nan_is_reported_as_a_failure_and_not_as_a_bug(cli, fp32_bundle, pictures, monkeypatch):
    def encode_image(self, pixels):
        return np.full((16, 64), np.nan, np.float32)

    monkeypatch.setattr(onnx_session.OnnxSequence, "encode_image", encode_image)
    result = verify(cli, fp32_bundle, pictures, "--json")
    assert result.code == 1
    (check,) = (c for c in result.document["checks"] if c["stage"] == "image_features")
    assert (check["value"], check["exact"], check["status"]) == (None, False, "failed")
    assert check["reason"] == "the outputs hold NaN or infinity"
    shown = verify(cli, fp32_bundle, pictures)
    assert shown.code == 1
    assert "not finite" in shown.out


def test_hard_pictures_and_text_alone_are_the_default(cli, fp32_bundle, monkeypatch):
    """Their text is not in this tokenizer's training, but in its alphabet."""
    asked: list[int] = []

    def some():
        found = hard_questions()
        asked.append(len(found))
        return QuestionSet((found[0], found[-1]), 1, 2)

    monkeypatch.setattr("fastvlm_convert.cli.verify.hard_questions", some)
    result = cli("verify", fp32_bundle, "--reference", CHECKPOINT)
    assert result.code == 0
    assert result.out.splitlines()[0] == "passed on 2 questions about 1 image"
    assert asked == [36]


def test_formats_of_ci_systems(cli, bundle, pictures):
    path = bundle / "onnx" / "vision_encoder.onnx_data"
    content = np.fromfile(path, np.uint8)
    content[-20_000:] = 0
    content.tofile(path)
    result = verify(cli, bundle, pictures, "--output-format", "github")
    assert (result.code, result.err) == (1, "")
    assert "::error title=onnx.image_features.sqnr_db::" in result.out
    assert all(line.startswith("::") for line in result.out.splitlines())
    result = verify(cli, bundle, pictures, "--output-format", "junit")
    suite = ET.fromstring(result.out).find("testsuite")
    assert suite is not None
    assert (result.code, suite.get("name"), int(suite.get("failures", "0")) >= 2) == (1, "verify", True)
