"""Traps for float16, sprung and repaired: the packages in the interpreter, rounding as a device may."""

from dataclasses import replace
from pathlib import Path

import coremltools
import numpy as np
import pytest
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.converters.mil.mil import types

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.exporters.coreml.paths import FILES
from fastvlm_convert.float16.repairs import needed_repairs, settings_of
from fastvlm_convert.metrics import sqnr_db
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import Recipe, without_data
from fastvlm_convert.recipe_settings import RepairSettings
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle, load_engine, load_reference
from tests.bundles import FP16, FP32, recipe
from tests.planted import (
    DEMO,
    answers,
    copy_demo,
    demo_tensors,
    forced_logits,
    plant_key_bias,
    plant_residual,
    scanned,
)

ALL = RepairSettings(1, (0, 1), (1, 2), (2, 3))
GATE_DB = 40  # of shipped recipes, for a device


def exported(checkpoint: Path, output: Path, settings: Recipe, precision: str) -> LoadedModel:
    short = replace(settings, common=replace(settings.common, max_context_length=128))
    export(checkpoint, output, recipe=short, targets=["coreml"])
    return load_bundle(output, "coreml", precision)


def worst(model: LoadedModel, reference: LoadedModel) -> float:
    """Least signal to noise of the answers' logits; NaN is the worst."""
    pairs = zip(forced_logits(reference, reference), forced_logits(model, reference), strict=True)
    return float(np.min([np.inf if (v := sqnr_db(a, b)) is None else v for a, b in pairs]))


@pytest.mark.parametrize("lengths", ["fixed", "range"])
def test_each_repair_is_exact(lengths, tmp_path):
    """In float32, with the cache in it too, on both functions: prefill in chunks, then decode."""
    coreml = {"kv_cache": "tensors", "sequence_lengths": lengths, "prefill_chunk": 32}
    settings = replace(recipe(FP32, coreml=coreml), repairs=ALL)
    model = exported(DEMO, tmp_path / "bundle", settings, "exact")
    reference = load_reference(open_checkpoint(DEMO))
    assert worst(model, reference) >= 100
    assert answers(model) == answers(reference)


def test_integers_are_lowered_exactly_too(tmp_path):
    """PreparedWeights weights with repairs: what the packages compute is what torch computes with them."""
    settings = recipe(FP32, coreml={"kv_cache": "tensors"})
    settings = replace(settings, quantize=without_data(recipe("int4")).quantize, repairs=ALL)
    model = exported(DEMO, tmp_path / "bundle", settings, "exact")
    engine = load_engine(open_checkpoint(DEMO), settings, 128)
    assert worst(model, engine) >= 100


def test_only_the_named_layers_are_unfused(tmp_path):
    """As coremltools reads the program; the scores are float32 inside a float16 decoder."""
    exported(DEMO, tmp_path / "bundle", replace(recipe(FP16), repairs=ALL), "exact")
    path = tmp_path / "bundle/coreml/decoder.mlpackage"
    spec = coremltools.models.utils.load_spec(str(path / FILES[1]))
    program = load_program(spec, spec.specificationVersion, str((path / FILES[2]).parent))
    program.validate()
    for function in ("prefill", "decode"):
        ops = {op.outputs[0].name: op for op in program.functions[function].operations}
        fused = {name for name, op in ops.items() if op.op_type == "scaled_dot_product_attention"}
        assert fused == {"l0_attn"}
        softmax = {name: op.outputs[0].dtype for name, op in ops.items() if op.op_type == "softmax"}
        assert softmax == dict.fromkeys(("l1_attn_weights", "l2_attn_weights", "l3_attn_weights"), types.fp32)
        assert {name for name in ops if name.endswith("bias_scores")} == {"l2_bias_scores", "l3_bias_scores"}
        assert ops["l3_attn"].outputs[0].dtype == types.fp16
        assert {op.outputs[0].dtype for name, op in ops.items() if name.endswith("_residual")} == {types.fp16}


@pytest.fixture(scope="module")
def trap(tmp_path_factory) -> tuple[Path, LoadedModel, RepairSettings]:
    """Residual sums of 120,000 and scores above 70,000; the reference; what the scan chooses."""
    checkpoint = copy_demo(tmp_path_factory.mktemp("trap"), plant_key_bias(plant_residual(demo_tensors())))
    report = scanned(checkpoint)
    sizes = {o.op: o.max_abs for o in report.ops}
    assert 119_000 < sizes["l1_residual"] < 121_000
    assert 65_504 < sizes["l2_attn_scores"] < 80_000
    assert 999 < sizes["l2_k_rotated"] < 1001
    chosen = settings_of(needed_repairs(report, recipe(FP16)))
    return checkpoint, load_reference(open_checkpoint(checkpoint)), chosen


def test_the_planted_model_is_the_demo(trap):
    _, reference, _ = trap
    assert answers(reference) == answers(load_reference(open_checkpoint(DEMO)))


def test_the_scan_chooses(trap):
    assert trap[2] == RepairSettings(2, (), (1, 2, 3), (1, 2, 3))


def test_repaired_it_answers_as_the_reference(trap, tmp_path):
    checkpoint, reference, chosen = trap
    model = exported(checkpoint, tmp_path / "bundle", replace(recipe(FP16), repairs=chosen), "device")
    assert answers(model) == answers(reference)
    assert worst(model, reference) >= GATE_DB
    assert model.session.trouble is None


@pytest.mark.parametrize(
    ("missing", "trouble"),
    [
        ({"residual_shift": 0, "float32_scores": (), "separate_key_bias": ()}, "inf first at 'l0_down'"),
        ({"residual_shift": 0}, "inf first at 'l0_down'"),
        ({"float32_scores": (), "separate_key_bias": ()}, "nan first at 'l1_attn'"),
        ({"separate_key_bias": ()}, None),
    ],
    ids=["all", "residual", "scores", "bias"],
)
def test_without_a_repair_it_does_not(missing, trouble, trap, tmp_path):
    checkpoint, reference, chosen = trap
    settings = replace(recipe(FP16), repairs=replace(chosen, **missing))
    model = exported(checkpoint, tmp_path / "bundle", settings, "device")
    found = worst(model, reference)
    if trouble is None:  # finite, but the cache has lost what the keys say beside their bias
        assert found < GATE_DB - 10
        assert model.session.trouble is None
    else:
        assert np.isnan(found)
        assert trouble in model.session.trouble


def test_keys_beyond_float16(tmp_path):
    """A bias of 100,000 that hardly counts in the scores: it cannot even be stored."""
    checkpoint = copy_demo(tmp_path, plant_key_bias(demo_tensors(), key=1e5, query=1e-3))
    chosen = needed_repairs(scanned(checkpoint), recipe(FP16))
    assert [(r.setting, r.value) for r in chosen] == [("rescaled_keys", (1, 2, 3))]
    with pytest.raises(RecipeError, match=r"l1_qkv_bias.*beyond float16's 65504"):
        exported(checkpoint, tmp_path / "plain", recipe(FP16), "device")
    settings = replace(recipe(FP16), repairs=settings_of(chosen))
    model = exported(checkpoint, tmp_path / "bundle", settings, "device")
    reference = load_reference(open_checkpoint(checkpoint))
    assert answers(model) == answers(reference)
    assert worst(model, reference) >= GATE_DB


def test_a_layer_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="names layer 4, but the decoder's layers are 0 to 3"):
        exported(DEMO, tmp_path / "bundle", recipe(FP16, repairs={"float32_scores": (4,)}), "exact")
    assert not (tmp_path / "bundle").exists()
