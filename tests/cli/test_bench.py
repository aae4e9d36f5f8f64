import shutil

from fastvlm_convert.bench.result import METRICS
from fastvlm_convert.manifest import load_manifest
from tests.bundles import copy_bundle
from tests.cli.conftest import CHECKPOINT

FEW = ("--trials", 2, "--new-tokens", 3, "--threads", 1)


def test_document(cli, fp32_bundle):
    result = cli("bench", fp32_bundle, "--reference", CHECKPOINT, *FEW, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert (document["schema_version"], document["command"], document["status"]) == (1, "bench", "passed")
    assert document["schema"] == "fastvlm-convert/bench"
    settings = document["settings"]
    assert (settings["trials"], settings["new_tokens"], settings["pinning"]["threads"]) == (2, 3, 1)
    assert document["machine"]["cores"] > 0
    assert document["machine"]["libraries"].keys() >= {"python", "numpy", "torch", "onnxruntime"}
    reference, bundle = document["contenders"]
    assert (reference["name"], bundle["name"]) == ("reference", "fp32 onnx")
    assert reference["executed_by"].startswith("torch")
    assert bundle["executed_by"].startswith("onnxruntime")
    assert reference["file_bytes"] == (CHECKPOINT / "model.safetensors").stat().st_size
    onnx = {p.name: p.stat().st_size for p in (fp32_bundle / "onnx").iterdir()}
    assert bundle["file_bytes"] == sum(onnx.values())
    for contender in (reference, bundle):
        assert set(contender["metrics"]) - {"energy_j"} == set(METRICS)
        assert set(contender["metrics"]["ttft_ms"]) == {"p50", "p90", "p99", "min", "max"}
        assert contender["metrics"]["ttft_ms"]["p99"] is None
        assert set(contender["warmup"]) == set(contender["metrics"])
        assert contender["measured_on"].startswith(document["machine"]["cpu"])
        assert ("energy_j" in contender["metrics"]) == (contender["energy_not_run"] is None)
        assert contender["peak_memory_bytes"] > 20e6
    assert set(reference["ratio_to_reference"].values()) == {1.0}
    assert set(bundle["ratio_to_reference"]) >= set(METRICS)


def test_table(cli, fp32_bundle, fp16_bundle):
    result = cli("bench", fp32_bundle, fp16_bundle, *FEW)
    assert result.code == 0
    for text in (
        "fp32 onnx",
        "fp16 onnx",
        "vision ms",
        "first token ms",
        "decode tok/s",
        "end to end ms",
        "first answer",
        "peak memory",
        "files",
    ):
        assert text in result.out
    assert "2 trials of 3 tokens on " in result.err
    assert "1 thread each, " in result.err


def test_a_bundle_that_breaks_while_it_is_measured(cli, fp32_bundle, tmp_path):
    bundle = copy_bundle(fp32_bundle, tmp_path)
    path = bundle / load_manifest(bundle).artifact("onnx", "embed").files[0]
    path.write_bytes(b"\xff" * path.stat().st_size)
    result = cli("bench", bundle, *FEW)
    assert (result.code, result.out) == (2, "")
    assert "error: ONNX Runtime refuses the graph" in result.err
    assert "(bundle onnx)" in result.err
    assert "Traceback" not in result.err


def test_answers_that_do_not_fit(cli, fp32_bundle):
    result = cli("bench", fp32_bundle, "--new-tokens", 4000, "--trials", 1)
    assert (result.code, result.out) == (2, "")
    assert "an answer of up to 4000 exceed the context of 2048 tokens" in result.err


def test_bundles_of_one_name_are_told_apart_by_their_paths(cli, fp32_bundle, tmp_path):
    copies = [shutil.copytree(fp32_bundle, tmp_path / place / "app") for place in ("a", "b")]
    document = cli("bench", *copies, "--trials", 1, "--new-tokens", 2, "--threads", 1, "--json").document
    assert [c["name"] for c in document["contenders"]] == [f"{copy} onnx" for copy in copies]


def test_a_baseline_is_not_written_into_a_bundle(cli, fp32_bundle):
    path = fp32_bundle / "onnx" / "bench.json"
    result = cli("bench", fp32_bundle, *FEW, "--save-baseline", path)
    assert (result.code, result.out) == (2, "")
    assert "error: a bundle holds the files that its manifest lists, and no others" in result.err
    assert not path.exists()


def test_a_gate_that_nothing_can_fail_is_refused(cli, fp32_bundle):
    result = cli("bench", fp32_bundle, "--against", fp32_bundle, "--max-regression", "inf")
    assert result.code == 2
    assert "error: --max-regression inf would let everything pass" in result.err


def test_a_stage_without_a_file_to_import(cli):
    result = cli("bench", "--import", "vision=")
    assert result.code == 2
    assert "error: --import vision= names no file" in result.err


def test_one_round_is_not_called_rounds(cli, fp32_bundle):
    result = cli("bench", fp32_bundle, "--trials", 1, "--new-tokens", 2, "--threads", 1)
    assert "\n1 trial of 2 tokens on " in result.err
    result = cli("bench", fp32_bundle, "--trials", 1, "--against", fp32_bundle)
    assert "error: there would be 1 round, and a comparison needs 30" in result.err
