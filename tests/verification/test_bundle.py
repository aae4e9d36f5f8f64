import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert.io_names import Component
from fastvlm_convert.manifest import FILE_NAME, file_entries
from fastvlm_convert.model.fastvlm import FastVLM
from fastvlm_convert.pictures import load_image
from fastvlm_convert.questions import Question
from fastvlm_convert.recipe import load_recipe, without_data
from fastvlm_convert.runtime import onnx_values
from fastvlm_convert.runtime.onnx_session import OnnxWeights
from fastvlm_convert.verification.bundle import VerifyResult, verify
from tests.bundles import (
    copy_bundle,
    edit_manifest,
    export_bundle,
    external_regions,
    graph_path,
    load_graph,
    recipe,
)
from tests.checkpoints import GOLDEN, LLAVA, edit_tensors, golden_cases, read_tensors

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
QUESTIONS = [Question((load_image(c.image),), c.question) for c in golden_cases() if c.name == LLAVA][:2]


def run(bundle: Path, checkpoint: Path = CHECKPOINT, **options) -> VerifyResult:
    return verify(bundle, checkpoint, questions=QUESTIONS, **options)


def failed(result: VerifyResult) -> dict[str, str | None]:
    return {f"{c.stage} {c.metric}": c.reason for c in result.checks if c.status == "failed"}


def change_one_weight(bundle: Path, component: Component, tensor: str) -> str:
    """Flip the sign of a tensor's largest value in the data file; returns the file's name."""
    location, offset, length = external_regions(load_graph(bundle, component))[tensor]
    path = graph_path(bundle, component).parent / location
    content = bytearray(path.read_bytes())
    values = np.frombuffer(content, np.float32, length // 4, offset)
    at = int(np.abs(values).argmax())
    values[at] = -values[at]
    path.write_bytes(content)
    return f"onnx/{location}"


@pytest.fixture
def bundle(fp32_bundle, tmp_path):
    return copy_bundle(fp32_bundle, tmp_path)


def test_the_golden_bundle_passes(fp32_bundle):
    stages: dict[str, list[float]] = {}
    result = run(fp32_bundle, on_progress=lambda stage, share: stages.setdefault(stage, []).append(share))
    assert result.status == "passed"
    assert result.warnings == ()
    values = [c.value for c in result.checks if c.metric == "sqnr_db" and c.value is not None]
    assert min(values) >= 100
    assert [c.exact for c in result.checks if c.metric in ("token_ids", "sha256")] == [True] * 3
    assert {c.executed_by for c in result.checks if c.stage in ("image_features", "greedy_text")} != {None}
    assert all(shares[-1] == 1.0 for shares in stages.values())
    assert {"files", "reference", "onnx"} <= set(stages)


@pytest.mark.parametrize(
    ("component", "tensor", "stage"),
    [
        ("vision", "s2b0_fc1_weight", "image_features"),
        ("vision", "projector_fc2_weight", "image_features"),
        ("decoder", "l1_down_weight", "decode_logits"),
        ("embed", "embed_tokens_weight", "decode_logits"),  # it is the head, too
    ],
)
def test_one_weight_changed_fails_by_hash_and_by_number(bundle, component, tensor, stage):
    file = change_one_weight(bundle, component, tensor)
    result = run(bundle)
    assert result.status == "failed"
    assert failed(result)["files sha256"] == f"changed: {file}"
    assert failed(result)[f"{stage} sqnr_db"].endswith("is below 100")


def test_a_changed_weight_fails_by_number_alone_where_the_hash_was_adapted(bundle):
    change_one_weight(bundle, "vision", "s2b0_fc1_weight")
    changed = {name: vars(e) for name, e in file_entries(bundle).items() if name != FILE_NAME}
    edit_manifest(bundle, lambda m: m["files"].update(changed))
    result = run(bundle)
    assert result.status == "failed"
    assert "files sha256" not in failed(result)
    assert "image_features sqnr_db" in failed(result)


def test_a_changed_tokenizer_fails(bundle):
    """Two ids swapped: the same size, other prompts."""
    path = bundle / "tokenizer.json"
    value = json.loads(path.read_text())
    vocab = value["model"]["vocab"]
    a, b = (token for token in vocab if vocab[token] in (258, 261))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    result = run(bundle)
    assert failed(result)["files sha256"] == "changed: tokenizer.json"
    assert failed(result)["preprocessing token_ids"] == "prompts differ: [0, 1]"


def test_a_side_file_that_no_runtime_of_ours_reads_counts_as_well(bundle):
    path = bundle / "generation_config.json"
    path.write_text(path.read_text().replace("false", "true "))
    result = run(bundle)
    assert failed(result) == {
        "files sha256": "changed: generation_config.json",
        "generation_config.json content": "do_sample is true, expected false",
    }
    assert result.status == "failed"


def test_a_graph_that_the_runtime_refuses_is_not_run(bundle):
    path = graph_path(bundle, "decoder")
    path.write_bytes(b"\xff" * path.stat().st_size)
    result = run(bundle)
    assert result.status == "failed"  # by its hash
    assert failed(result) == {"files sha256": "changed: onnx/decoder_model_merged.onnx"}
    absent = [c for c in result.checks if c.status == "not_run"]
    assert [c.stage for c in absent][-2:] == ["greedy_text", "context_end"]
    assert all("ONNX Runtime refuses the graph" in str(c.reason) for c in absent)


def test_without_onnxruntime_nothing_is_claimed(fp32_bundle, monkeypatch):
    monkeypatch.delitem(sys.modules, "fastvlm_convert.runtime.onnx_session", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run(fp32_bundle)
    assert result.status == "not_run"
    assert result.measurements == ()
    by_stage = {c.stage: c for c in result.checks if c.target == "onnx"}
    assert list(by_stage) == [
        "preprocessing", "image_features", "inputs_embeds", "prefill_logits", "decode_logits", "greedy_text",
        "context_end",
    ]  # fmt: skip
    for check in by_stage.values():
        assert (check.status, check.value, check.exact, check.executed_by) == ("not_run", None, False, None)
        assert "onnxruntime, which is not installed" in str(check.reason)


def test_another_reference_fails_and_is_named(fp32_bundle, llava):
    tensors = read_tensors(llava)
    edit_tensors(llava, {"model.norm.weight": tensors["model.norm.weight"] * 1.01})
    result = run(fp32_bundle, llava)
    assert "prefill_logits sqnr_db" in failed(result)
    assert result.warnings == (
        "the bundle was made from other files than this reference (their hashes differ)",
    )


def test_a_bundle_with_a_short_context_can_be_verified(tmp_path):
    """Prompt (49 tokens) and the recipe's 64 answer tokens exceed it; the answer is cut to what fits."""
    settings = recipe(common={"max_context_length": 64})
    bundle = export_bundle(CHECKPOINT, tmp_path / "bundle", settings)
    assert run(bundle).status == "passed"


def test_another_image_size_and_mode_are_verified_against_the_reference_at_those(tmp_path):
    settings = recipe(common={"image_size": 320, "image_mode": "crop"}, gates={"max_new_tokens": 8})
    bundle = export_bundle(CHECKPOINT, tmp_path / "bundle", settings)
    assert run(bundle).status == "passed"


def test_the_gates_are_the_recipes(tmp_path):
    settings = recipe(gates={"min_sqnr_db": 140, "max_new_tokens": 4})
    bundle = export_bundle(CHECKPOINT, tmp_path / "bundle", settings)
    result = run(bundle)
    assert "image_features sqnr_db" in failed(result)
    assert {c.threshold for c in result.checks if c.metric == "sqnr_db"} == {140}


def test_float16_keeps_what_can_be_kept_of_a_random_net(fp16_bundle):
    """Rounding its weights costs this net a little more than the gate allows, and changes near-tied words."""
    result = run(fp16_bundle)
    values = {c.stage: c.value for c in result.checks if c.metric == "sqnr_db" and c.value is not None}
    assert values["image_features"] > 45
    assert values["inputs_embeds"] > 85
    assert min(values["prefill_logits"], values["decode_logits"]) > 45


def test_a_picture_is_encoded_once_by_every_encoder_there_is(tmp_path, monkeypatch):
    """By the float model, by that with the integers, and by the graph, which both executions share."""
    bundle = export_bundle(CHECKPOINT, tmp_path / "bundle", without_data(load_recipe("int4")))
    encoded: dict[type, list[bytes]] = {FastVLM: [], OnnxWeights: []}
    watched, values = [], onnx_values.onnx_values

    def watch(kind: type) -> None:
        encode = kind.encode_image

        def watching(self, pixels):
            encoded[kind].append(np.asarray(pixels).tobytes())
            return encode(self, pixels)

        monkeypatch.setattr(kind, "encode_image", watching)

    def watching_values(bundle, manifest, inputs, *rest, **options):
        watched.append((sorted(inputs), options["exact"]))
        values(bundle, manifest, inputs, *rest, **options)

    for kind in encoded:
        watch(kind)
    monkeypatch.setattr(onnx_values, "onnx_values", watching_values)
    result = run(bundle)
    pictures = len({question.images[0].tobytes() for question in QUESTIONS})
    assert len(encoded[FastVLM]) == 2 * len(set(encoded[FastVLM])) == 2 * pictures
    assert len(encoded[OnnxWeights]) == len(set(encoded[OnnxWeights])) == pictures
    assert watched == [(["decoder", "vision"], False), (["decoder"], True)]
    shown = {by: {} for by in dict.fromkeys(f.executed_by for f in result.layers if f.target == "onnx")}
    for figure in result.layers:
        if figure.target == "onnx":
            assert figure.is_run
            shown[figure.executed_by][figure.name] = figure.decibels
    shipped, exact = shown.values()
    assert shipped["projector_fc2"] == exact["projector_fc2"]
    assert shipped["l1_down"] < exact["l1_down"]
