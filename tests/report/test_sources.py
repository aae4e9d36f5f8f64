"""Documents of other commands, as the page takes them."""

import json

import pytest

from fastvlm_convert.errors import BundleError
from fastvlm_convert.evaluation.models import bundle_hash
from fastvlm_convert.report.sources.bench import read_bench
from fastvlm_convert.report.sources.bundle import read_bundle
from fastvlm_convert.report.sources.evaluation import read_evaluation
from tests.report import documents
from tests.report.pages import Elements, page


@pytest.fixture
def evaluation(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(documents.evaluation()))
    return path


@pytest.fixture
def bench(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(documents.bench()))
    return path


def test_an_evaluation(fp32_bundle, evaluation):
    text = Elements(page(fp32_bundle, evaluation=read_evaluation(evaluation, fp32_bundle))).text
    assert "demo: 40 questions about 31 pictures; 2 are not answered with the same text by all." in text
    assert "90.0 (80.0 to 95.0)" in text
    assert "difference -5.0 (-10.0 to +0.0)" in text
    assert "mind this" in text
    assert "fewer than 30 pictures" in text


def test_an_evaluation_of_another_bundle_is_said_to_be_one(fp32_bundle, evaluation):
    warning = "none of these models is this bundle as it is now"
    assert warning in read_evaluation(evaluation, fp32_bundle).notes[0]
    document = json.loads(evaluation.read_text())
    document["models"][1]["sha256"] = bundle_hash(fp32_bundle)
    evaluation.write_text(json.dumps(document))
    assert warning not in "".join(read_evaluation(evaluation, fp32_bundle).notes)


def test_a_measurement_with_intervals_and_phones(fp32_bundle, bench):
    found = read_bench(bench)
    assert found.method == "30 trials of 32 tokens on a processor, 2 cores, Linux"
    assert [c.executed_by for c in found.contenders] == ["torch", "torch on iPhone 16"]
    latency, decoding = found.panels
    assert (latency.better, latency.bars[1].low, latency.bars[1].high) == ("lower", 70.0, 95.0)
    assert (decoding.better, decoding.bars[1].low, decoding.bars[1].high) == ("higher", 72.0, 99.0)
    text = Elements(page(fp32_bundle, bench=found)).text
    assert "80 (0.80x, 0.70 to 0.90)" in text
    assert "be careful" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(models=None), "models is null, expected a list of objects"),
        (
            lambda d: d["models"][1]["scores"][0].update(value="high"),
            r"models\[1\].scores\[0\].value is 'high'",
        ),
        (lambda d: d["models"][1]["scores"][0].update(value=float("inf")), "expected a number"),
        (lambda d: d["dataset"].update(num_items=1.5), "dataset.num_items is 1.5, expected a whole number"),
        (lambda d: d["dataset"].update(name=["a"]), "dataset.name is .*, expected a text"),
        (lambda d: d.update(warnings=[1]), "warnings is .*, expected a list of texts"),
    ],
)
def test_a_malformed_document_is_refused_with_the_place(fp32_bundle, evaluation, change, message):
    document = json.loads(evaluation.read_text())
    change(document)
    evaluation.write_text(json.dumps(document))
    with pytest.raises(BundleError, match=message):
        read_evaluation(evaluation, fp32_bundle)


def test_sizes_by_part_add_up_to_what_is_stored(fp32_bundle):
    facts = read_bundle(fp32_bundle)
    assert facts.bits_per_weight == 32
    assert {part.name for part in facts.parts} == {"encoder", "projector", "decoder", "embedding"}
    manifest = facts.manifest
    files = {file for artifact in manifest.artifacts for file in artifact.files}
    assert facts.target_bytes == {"onnx": sum(manifest.files[file].size for file in files)}
    stored = sum(sum(part.stored_bytes.values()) for part in facts.parts)
    assert 0.5 * facts.target_bytes["onnx"] < stored < facts.target_bytes["onnx"]
