from fastvlm_convert.bench.result import METRICS
from fastvlm_convert.manifest import load_manifest
from tests.bundles import copy_bundle
from tests.cli.conftest import CHECKPOINT

FEW = ("--trials", 2, "--new-tokens", 3)


def test_document(cli, fp32_bundle):
    result = cli("bench", fp32_bundle, "--reference", CHECKPOINT, *FEW, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert (document["schema_version"], document["command"], document["status"]) == (1, "bench", "passed")
    assert (document["trials"], document["new_tokens"]) == (2, 3)
    assert document["host"]["cpu_count"] > 0
    reference, bundle = document["contenders"]
    assert (reference["name"], bundle["name"]) == ("reference", "fp32 onnx")
    assert reference["executed_by"].startswith("torch")
    assert bundle["executed_by"].startswith("onnxruntime")
    assert reference["file_bytes"] == (CHECKPOINT / "model.safetensors").stat().st_size
    onnx = {p.name: p.stat().st_size for p in (fp32_bundle / "onnx").iterdir()}
    assert bundle["file_bytes"] == sum(onnx.values())
    for contender in (reference, bundle):
        assert set(contender["metrics"]) == set(METRICS)
        assert set(contender["metrics"]["ttft_ms"]) == {"p50", "p90", "min", "max"}
        assert contender["peak_memory_bytes"] > 20e6
    assert set(reference["ratio_to_reference"].values()) == {1.0}
    assert set(bundle["ratio_to_reference"]) == set(METRICS)


def test_table(cli, fp32_bundle, fp16_bundle):
    result = cli("bench", fp32_bundle, fp16_bundle, *FEW)
    assert result.code == 0
    for text in (
        "fp32 onnx",
        "fp16 onnx",
        "vision ms",
        "first token ms",
        "decode tok/s",
        "peak memory",
        "files",
    ):
        assert text in result.out
    assert "2 trials of 3 tokens on " in result.err


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
