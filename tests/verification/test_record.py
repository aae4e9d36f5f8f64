"""verification.json: written beside what is hashed, bound to the manifest, and read back."""

import json
import os

import pytest

from fastvlm_convert.errors import BundleError, OutputError
from fastvlm_convert.manifest import FILE_NAME, VERIFICATION_FILE, load_manifest
from fastvlm_convert.verification.bundle import VerifyResult
from fastvlm_convert.verification.check import Check, Measurement
from fastvlm_convert.verification.record import manifest_hash, read_record, require_recordable, write_record
from tests.bundles import copy_bundle, edit_manifest

CHECK = Check("onnx", "greedy_text", "token_ids", None, True, "onnxruntime 1", None, "passed", None)
SKIPPED = Check("coreml", "greedy_text", "token_ids", None, False, None, None, "not_run", "why")
MEASURED = Measurement("onnx", "end_to_end", "kl_mean_nats", 1e-6, False, "onnxruntime 1")
RESULT = VerifyResult((CHECK, SKIPPED), (MEASURED,), ("odd",), 3, "f" * 64)


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
        (lambda r: r.update(schema_version=2), "record version 2; this tool reads 1"),
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
