"""verification.json: written beside what is hashed, bound to the manifest, and read back."""

import json
import os

import pytest

from fastvlm_convert.errors import BundleError, OutputError
from fastvlm_convert.manifest import FILE_NAME, VERIFICATION_FILE, load_manifest
from fastvlm_convert.verification.answers import Answer
from fastvlm_convert.verification.bundle import VerifyResult
from fastvlm_convert.verification.check import Check, Measurement
from fastvlm_convert.verification.diagnosis import Diagnosis
from fastvlm_convert.verification.layers import Divergence, LayerFigure
from fastvlm_convert.verification.record import manifest_hash, read_record, require_recordable, write_record
from tests.bundles import copy_bundle, edit_manifest

CHECK = Check("onnx", "greedy_text", "token_ids", None, True, "onnxruntime 1", None, "passed", None)
SKIPPED = Check("coreml", "greedy_text", "token_ids", None, False, None, None, "not_run", "why")
MEASURED = Measurement("onnx", "end_to_end", "kl_mean_nats", 1e-6, False, "onnxruntime 1")
ANSWERS = tuple(
    Answer("onnx", "onnxruntime 1", f"{n}.png", "What?", "This.", "That.", n or None, kl, ())
    for n, kl in enumerate([(0.0, 1e-9), (0.5, None)])
)
LAYERS = (
    LayerFigure("onnx", "onnxruntime 1", "l3_gate", 61.5, None),
    LayerFigure("onnx", "onnxruntime 1", "l3_up", None, "equal"),
)
DIVERGENCE = Divergence("prefill_logits", "l3_gate", "61.5 dB, below 100")
DIAGNOSIS = Diagnosis("onnx", "prefill_logits", "sqnr_db", "onnxruntime 1", "layer_weights", "its weights")
RESULT = VerifyResult(
    checks=(CHECK, SKIPPED),
    measurements=(MEASURED,),
    warnings=("odd",),
    num_questions=3,
    reference_sha256="f" * 64,
    answers=ANSWERS,
    layers=LAYERS,
    first_divergence={"onnx": DIVERGENCE, "coreml": None},
    diagnoses=(DIAGNOSIS,),
)


@pytest.fixture
def bundle(fp32_bundle, tmp_path):
    return copy_bundle(fp32_bundle, tmp_path)


def test_what_was_written_is_read(bundle):
    before = (bundle / FILE_NAME).read_bytes()
    assert read_record(bundle) is None
    assert write_record(bundle, RESULT) == bundle / VERIFICATION_FILE
    record = read_record(bundle)
    assert (record.checks, record.measurements, record.warnings) == (RESULT.checks, (MEASURED,), ("odd",))
    assert (record.status, record.num_questions, record.reference_sha256) == ("not_run", 3, "f" * 64)
    assert (record.answers, record.layers, record.diagnoses) == (ANSWERS, LAYERS, (DIAGNOSIS,))
    assert record.first_divergence == {"onnx": DIVERGENCE, "coreml": None}
    assert record.answer_figures == RESULT.figures
    assert record.manifest_sha256 == manifest_hash(bundle)
    assert (bundle / FILE_NAME).read_bytes() == before
    load_manifest(bundle)


def test_it_depends_on_what_was_found_alone(bundle):
    write_record(bundle, RESULT)
    first = (bundle / VERIFICATION_FILE).read_bytes()
    write_record(bundle, RESULT)
    assert (bundle / VERIFICATION_FILE).read_bytes() == first
    assert sorted(p.name for p in bundle.iterdir() if p.name.startswith(".")) == []


def test_it_is_bound_to_the_manifest(bundle):
    write_record(bundle, RESULT)
    edit_manifest(bundle, lambda m: None)  # another layout of the same content is another file
    with pytest.raises(BundleError, match="about another manifest"):
        read_record(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema="x"), "not a record"),
        (lambda r: r.update(schema_version=1), "record version 1; this tool reads 2"),
        (lambda r: r.update(status="passed"), "status is passed, its checks say not_run"),
        (lambda r: r["checks"][0].update(status="fine"), "malformed"),
        (lambda r: r.pop("checks"), "missing setting checks"),
    ],
)
def test_a_damaged_record_is_said(bundle, change, message):
    write_record(bundle, RESULT)
    path = bundle / VERIFICATION_FILE
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(BundleError, match=message):
        read_record(bundle)


def test_where_it_cannot_be_written_is_said(bundle):
    (bundle / VERIFICATION_FILE).mkdir()
    with pytest.raises(OutputError, match="cannot record"):
        write_record(bundle, RESULT)
    with pytest.raises(OutputError, match="cannot record"):
        require_recordable(bundle)
    (bundle / VERIFICATION_FILE).rmdir()
    require_recordable(bundle)
    os.mkfifo(bundle / VERIFICATION_FILE)
    with pytest.raises(BundleError, match="it is a pipe"):
        read_record(bundle)
