import sys

import numpy as np
import pytest

from fastvlm_convert.questions import QuestionSet, standard_questions
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
    assert "greedy_text" in result.out
    assert "failed" not in result.out
    assert result.out.splitlines()[-1] == "passed on 2 images"
    assert result.out.count("onnxruntime ") >= 6


def test_document(cli, fp32_bundle, pictures):
    result = verify(cli, fp32_bundle, pictures, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert (document["schema_version"], document["command"], document["status"]) == (1, "verify", "passed")
    assert document["bundle"] == str(fp32_bundle)
    assert document["reference"] == str(CHECKPOINT)
    assert document["questions"] == 2
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
    assert result.out.splitlines()[-1] == "failed on 2 images"
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
    assert result.out.splitlines()[-1] == "not_run on 2 images"
    assert verify(cli, fp32_bundle, pictures, "--json").document["status"] == "not_run"


def test_nan_is_reported_as_a_failure_and_not_as_a_bug(cli, fp32_bundle, pictures, monkeypatch):
    def encode_image(self, pixels):
        return np.full((16, 64), np.nan, np.float32)

    monkeypatch.setattr(onnx_session.OnnxSession, "encode_image", encode_image)
    result = verify(cli, fp32_bundle, pictures, "--json")
    assert result.code == 1
    (check,) = (c for c in result.document["checks"] if c["stage"] == "image_features")
    assert (check["value"], check["exact"], check["status"]) == (None, False, "failed")
    assert check["reason"] == "the outputs hold NaN or infinity"
    shown = verify(cli, fp32_bundle, pictures)
    assert shown.code == 1
    assert "not finite" in shown.out


def test_sixteen_standard_pictures_are_the_default(cli, fp32_bundle, monkeypatch):
    """Their text is not in this tokenizer's training, but in its alphabet."""
    asked: list[int] = []

    def some():
        found = standard_questions()
        asked.append(len(found))
        return QuestionSet(found[:2], 2, 2)

    monkeypatch.setattr("fastvlm_convert.cli.verify.standard_questions", some)
    result = cli("verify", fp32_bundle, "--reference", CHECKPOINT)
    assert result.code == 0
    assert asked == [16]
