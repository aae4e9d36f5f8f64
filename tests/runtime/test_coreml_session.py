"""Core ML bundles through the interpreter, against the reference."""

from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert.exporters.coreml import ops
from fastvlm_convert.exporters.coreml.graph import Graph
from fastvlm_convert.exporters.coreml.metadata import Metadata
from fastvlm_convert.exporters.coreml.proto import write_package
from fastvlm_convert.exporters.coreml.vision import build_apple_vision
from fastvlm_convert.generate import generate, teacher_forced
from fastvlm_convert.metrics import sqnr_db, top1_agreement
from fastvlm_convert.mil import Interpreter
from fastvlm_convert.pictures import load_image
from fastvlm_convert.pipeline import export
from fastvlm_convert.prompt_reading import embed_prompt
from fastvlm_convert.recipe_settings import FloatSettings, RepairSettings
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle, load_reference
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.rescale import repaired_config
from fastvlm_convert.weights.source import computed
from tests.bundles import FP16, FP32, recipe
from tests.checkpoints import GOLDEN, LLAVA, golden_cases, golden_checkpoint

CASES = [case for case in golden_cases() if case.name == LLAVA]
TENSORS = {"kv_cache": "tensors"}

# What is exported, the precision it is run in, and the least signal to noise of the logits.
VARIANTS = {
    "fp32": (FP32, {}, "exact", 60),
    "fp32_cache_as_tensors": (FP32, TENSORS, "exact", 100),
    "fp32_chunks_of_16": (FP32, {**TENSORS, "prefill_chunk": 16}, "exact", 100),
    "fp32_range": (FP32, {**TENSORS, "prefill_chunk": 16, "sequence_lengths": "range"}, "exact", 100),
    "fp32_enumerated": (
        FP32,
        {**TENSORS, "prefill_chunk": 16, "sequence_lengths": "enumerated"},
        "exact",
        100,
    ),
    "fp32_tensor_input": (FP32, {**TENSORS, "image_input": "tensor"}, "exact", 100),
    "fp32_decomposed": (FP32, {**TENSORS, "attention": "decomposed"}, "exact", 100),
    # Heads, tables, MLPs and projector in parts, along inputs and outputs.
    "fp32_split": (FP32, {**TENSORS, "split_wider_than": 70}, "exact", 100),
    "fp32_split_range": (
        FP32,
        {**TENSORS, "split_wider_than": 64, "attention": "decomposed", "sequence_lengths": "range"},
        "exact",
        100,
    ),
    "fp16": (FP16, {}, "exact", 50),
    "fp16_decomposed_device": (FP16, {"attention": "decomposed", "split_wider_than": 100}, "device", 40),
    "fp16_chunks_of_16": (FP16, {"prefill_chunk": 16}, "exact", 50),
    "fp16_device": (FP16, {}, "device", 40),
}


@pytest.fixture(scope="module")
def reference() -> LoadedModel:
    return load_reference(golden_checkpoint(LLAVA))


def load(tmp_path: Path, name: str, settings: dict, precision: str) -> LoadedModel:
    bundle = tmp_path / "bundle"
    export(GOLDEN / LLAVA / "checkpoint", bundle, recipe=recipe(name, coreml=settings), targets=["coreml"])
    return load_bundle(bundle, "coreml", precision)


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_the_reference(variant, reference, tmp_path):
    name, settings, precision, least = VARIANTS[variant]
    candidate = load(tmp_path, name, settings, precision)
    assert candidate.session.executed_by == f"interpreter ({precision})"
    for case in CASES:
        prompt = reference.prompt(case.question, [load_image(case.image)])
        features = [reference.session.encode_image(image) for image in prompt.images]
        ours = candidate.session.encode_image(prompt.images[0])
        assert (sqnr_db(features[0], ours) or np.inf) >= (100 if name == FP32 else 45)
        embeds = embed_prompt(reference.session, prompt, features)
        forced = case.greedy_token_ids
        expected = teacher_forced(reference.session, embeds, forced)
        logits = teacher_forced(candidate.session, embeds, forced)
        assert sqnr_db(expected, logits) >= least
    assert candidate.session.trouble is None


def test_greedy_tokens_are_the_goldens(tmp_path):
    candidate = load(tmp_path, FP16, {"prefill_chunk": 16}, "exact")
    for case in CASES:
        prompt = candidate.prompt(case.question, [load_image(case.image)])
        assert list(generate(candidate.session, prompt, (), 24).token_ids) == case.greedy_token_ids


def test_text_alone_and_two_pictures(reference, tmp_path):
    candidate = load(tmp_path, FP32, {"prefill_chunk": 16}, "exact")
    pictures = [load_image(case.image) for case in CASES[:2]]
    for images in ([], pictures):
        answers = [
            generate(m.session, m.prompt("How many circles are there?", images), (), 12).token_ids
            for m in (reference, candidate)
        ]
        assert answers[0] == answers[1]


def test_300_forced_tokens(reference, tmp_path):
    """Far beyond the prompt, positions and cache still agree: random ids, so nothing hides in a loop."""
    candidate = load(tmp_path, FP16, {}, "exact")
    ids = np.random.default_rng(0).integers(0, 429, 340)
    embeds = reference.session.embed(ids[:40])
    expected, logits = (teacher_forced(m.session, embeds, list(ids[40:])) for m in (reference, candidate))
    assert len(logits) == 300
    assert top1_agreement(expected, logits) >= 0.99


def rms_norm(tmp_path: Path, rows: np.ndarray, shift: int, precision: str) -> np.ndarray:
    """The decoder's own RMSNorm, float16, on its own in a package, for a stream that is shifted."""
    repairs = RepairSettings(residual_shift=shift)
    config = repaired_config(golden_checkpoint(LLAVA).config, repairs)
    graph = Graph("main", {}, FloatSettings("float16", "float16"), lambda count: None)
    scale = computed((rows.shape[-1],), "float32", lambda: np.ones(rows.shape[-1], np.float32))
    x = graph.input("x", "float16", rows.shape)
    graph.output(ops.rms_norm(graph, "final_norm", x, scale, config.decoder))
    package = tmp_path / "norm.mlpackage"
    write_package(package, [graph], Metadata("", "", {}, {"x": "", "final_norm": ""}))
    interpreter = Interpreter(package, precision)
    result = interpreter.predict({"x": rows.astype(np.float16)})["final_norm"].astype(np.float32)
    assert not interpreter.nonfinite
    return result


@pytest.mark.parametrize("shift", [0, 3])
def test_rms_norm_neither_overflows_nor_divides_by_zero(shift, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1, 5, 896)).astype(np.float32)
    rows[0, 1] *= 2000
    rows[0, 2] *= 1e-3
    rows[0, 3] = 0
    rows[0, 4, 7] = 30_000
    x = rows.astype(np.float16).astype(np.float64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    found = rms_norm(tmp_path, rows / 2**shift, shift, "device")
    assert np.all(found[0, 3] == 0)
    for row, least in ((0, 55), (1, 55), (2, 30), (4, 55)):
        assert sqnr_db(expected[0, row], found[0, row]) >= least, row


@pytest.mark.parametrize(("storage", "least"), [("float32", 100), ("float16", 50)])
def test_the_package_for_apples_app(storage, least, tmp_path):
    """Its program at the golden's size: features without projector, attention in steps (iOS 16)."""
    checkpoint = golden_checkpoint(LLAVA)
    graph = Graph("main", {}, FloatSettings(storage, "float32"), lambda count: None, "iOS16")
    build_apple_vision(graph, checkpoint.config, fold(checkpoint.weights))
    package = tmp_path / "fastvithd.mlpackage"
    write_package(package, [graph], Metadata("", "", {}, {"images": "", "image_features": ""}))
    interpreter = Interpreter(package)
    (given,), (gives,) = interpreter.functions["main"].inputs, interpreter.functions["main"].outputs
    assert (given.name, given.dtype, given.shape) == ("images", "float32", (1, 3, 256, 256))
    assert (gives.name, gives.dtype) == ("image_features", "float32")
    for case in CASES:
        found = interpreter.predict({"images": case.array("pixel_values")})["image_features"]
        assert sqnr_db(case.array("vision_features"), found) >= least
