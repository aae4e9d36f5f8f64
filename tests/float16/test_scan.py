import math
from dataclasses import replace

import coremltools
import pytest
import torch

from fastvlm_convert.checkpoint.checkpoint import content_hash, open_checkpoint
from fastvlm_convert.exporters.coreml.paths import FILES
from fastvlm_convert.float16.repairs import needed_repairs, settings_of
from fastvlm_convert.float16.report import RangeReport, save_report
from fastvlm_convert.float16.scan import scan
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pictures import load_image
from fastvlm_convert.pipeline import export
from fastvlm_convert.prompt_reading import embed_prompt
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import load_folded_reference
from tests.bundles import FP16, FP32, recipe
from tests.checkpoints import LLAVA, copy_checkpoint, edit_tensors, golden_cases, read_tensors

CASES = [case for case in golden_cases() if case.name == LLAVA]


def run_scan(folder, max_new_tokens: int = 4) -> RangeReport:
    checkpoint = open_checkpoint(folder)
    loaded, model = load_folded_reference(checkpoint)
    questions = [Question((load_image(c.image),), c.question) for c in CASES]
    return scan(model, loaded, questions, content_hash(checkpoint.files), max_new_tokens)


def multiply(folder, name: str, factor: float) -> None:
    edit_tensors(folder, {name: read_tensors(folder)[name] * factor})


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> RangeReport:
    return run_scan(copy_checkpoint(LLAVA, tmp_path_factory.mktemp("scan")))


def test_figures_are_those_of_the_network(report, llava):
    """Recomputed without hooks, on the first layers of each part."""
    found = {o.op: o.max_abs for o in report.ops}
    loaded, model = load_folded_reference(open_checkpoint(llava))
    stem, scores = 0.0, 0.0
    with torch.inference_mode():
        for case in CASES:
            prompt = loaded.prompt(case.question, [load_image(case.image)])
            stem = max(stem, float(model.vision.stem[0](torch.from_numpy(prompt.images[0])).abs().max()))
            embeds = embed_prompt(loaded.session, prompt, [loaded.session.encode_image(prompt.images[0])])
            layer = model.decoder.layers[0]
            normed = layer.input_layernorm(torch.from_numpy(embeds)[None])
            q = layer.self_attn.q_proj(normed).view(-1, 4, 16).norm(dim=-1).max()
            k = layer.self_attn.k_proj(normed).view(-1, 2, 16).norm(dim=-1).max()
            scores = max(scores, float(q * k))
    assert found["stem_0"] == pytest.approx(stem, rel=1e-6)
    # Rotations keep lengths, so no score exceeds the product of the longest query and key.
    assert 0.3 * scores < found["l0_attn_scores"] <= scores
    assert all(math.isfinite(value) and value > 0 for value in found.values())


def test_operations_are_called_as_in_the_programs(report, llava, tmp_path):
    export(llava, tmp_path / "bundle", recipe=recipe(FP16), targets=["coreml"])
    names = set()
    for package in ("vision", "decoder"):
        spec = coremltools.models.utils.load_spec(
            str(tmp_path / f"bundle/coreml/{package}.mlpackage" / FILES[1])
        )
        for function in spec.mlProgram.functions.values():
            for block in function.block_specializations.values():
                names |= {output.name for operation in block.operations for output in operation.outputs}
    # Scores are inside the fused operation, keys without their bias inside the product.
    scanned = {o.op for o in report.ops if not o.op.endswith(("_scores", "_k_unbiased"))}
    assert scanned <= names
    assert len(scanned) > 60


def test_planted_outliers_are_found(llava):
    multiply(llava, "model.layers.1.mlp.down_proj.weight", 1e5)
    multiply(llava, "model.layers.0.mlp.up_proj.weight", 1e-9)
    found = run_scan(llava)
    assert {"l1_down", "l1_residual"} <= {o.op for o in found.risky()}
    assert "l0_down" not in {o.op for o in found.risky()}
    flushed = {o.op: o.flushed_share for o in found.ops}
    assert flushed["l0_up"] > 0.9
    assert flushed["l0_gate"] < 0.01


@pytest.mark.parametrize(("factor", "status"), [(1.0, "passed"), (1e5, "failed")])
def test_export_reads_what_was_scanned(factor, status, llava, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))
    multiply(llava, "model.layers.1.mlp.down_proj.weight", factor)
    before = export(llava, tmp_path / "before", recipe=recipe(FP16), targets=["onnx"])
    assert before.manifest.fp16_range == "not_run"
    save_report(run_scan(llava))
    result = export(llava, tmp_path / "after", recipe=recipe(FP16), targets=["onnx"])
    assert load_manifest(tmp_path / "after").fp16_range == status
    warned = [w for w in result.warnings if "headroom" in w]
    assert bool(warned) == (status == "failed")
    if warned:
        assert "repairs that recipe 'fp16' lacks: residual_shift (l1_" in warned[0]
        assert "`fastvlm-convert scan CHECKPOINT --recipe fp16 -o FILE`" in warned[0]
        assert "stem" not in "".join(warned)  # the encoder computes in float32


def test_islands_silence_the_warning(llava, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))
    multiply(llava, "model.layers.1.mlp.down_proj.weight", 1e5)
    found = run_scan(llava)
    save_report(found)
    kept = tuple(o.op for o in found.risky() if not o.op.endswith("scores"))
    result = export(
        llava, tmp_path / "bundle", recipe=recipe(FP16, decoder={"float32_ops": kept}), targets=["coreml"]
    )
    assert not [w for w in result.warnings if "headroom" in w]


def test_a_repaired_recipe_silences_the_warning(llava, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))
    multiply(llava, "model.layers.1.mlp.down_proj.weight", 3e4)
    found = run_scan(llava)
    save_report(found)
    chosen = needed_repairs(found, recipe(FP16))
    assert [repair.setting for repair in chosen] == ["residual_shift"]
    settings = replace(recipe(FP16), repairs=settings_of(chosen))
    result = export(llava, tmp_path / "bundle", recipe=settings, targets=["onnx", "coreml"])
    assert not [w for w in result.warnings if "scan" in w]
    assert result.manifest.fp16_range == "passed"
    assert load_manifest(tmp_path / "bundle").recipe.repairs == settings.repairs


def test_in_float32_a_key_bias_matters_to_the_state_alone(llava, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))
    attention = "model.layers.1.self_attn"
    biases = {f"{attention}.k_proj.bias": torch.full((32,), 1e3), f"{attention}.q_proj.bias": torch.ones(64)}
    edit_tensors(llava, biases)
    save_report(run_scan(llava))
    for target, asks in (("onnx", False), ("coreml", True)):
        result = export(llava, tmp_path / target, recipe=recipe(FP32), targets=[target])
        assert any("lacks: separate_key_bias (keys of layer 1" in w for w in result.warnings) == asks
        assert result.manifest.fp16_range == "passed"  # imprecise, but within range


def test_keys_are_measured_before_and_after_bias_and_rotation(report, llava):
    found = {o.op: o.max_abs for o in report.ops}
    edit_tensors(llava, {"model.layers.1.self_attn.k_proj.bias": torch.full((32,), 50.0)})
    biased = {o.op: o.max_abs for o in run_scan(llava).ops}
    assert biased["l1_k_unbiased"] == pytest.approx(found["l1_k_unbiased"], rel=1e-5)
    length = 50 * 2**0.5  # of a pair
    assert abs(biased["l1_k_rotated"] - length) <= 2**0.5 * found["l1_k_unbiased"]
    assert biased["l0_k_rotated"] == found["l0_k_rotated"] >= found["l0_k_unbiased"] / 2**0.5
    assert 0 < found["l1_v_heads"] <= found["l1_qkv"]
    assert 0 < found["l1_q_rotated"] <= 2**0.5 * found["l1_qkv"]
