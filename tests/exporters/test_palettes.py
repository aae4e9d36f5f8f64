"""Palettes in Core ML packages, bit for bit the engine's, read back with coremltools; refused for ONNX."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from coremltools.converters.mil.mil import types

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import RecipeError, TargetError
from fastvlm_convert.metrics import sqnr_db
from fastvlm_convert.pipeline import export
from fastvlm_convert.quantization.palettes import palettize
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.quantized.schemes import PaletteMatrix, PaletteScheme
from fastvlm_convert.quantized.weight import stacked, without_palettes
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.runtime.loaded import load_bundle, load_engine
from tests.bundles import FP16, FP32, recipe
from tests.exporters.stored import CHECKPOINT, decompressions, engine, shapes

# Every number of bits with and without scales; linear layers alone and stacked, convolutions of 1 x 1, larger
# and depthwise ones, and the table that is both looked up and multiplied with.
RULES = (
    QuantizeRule(("*.self_attn.[qkv]_proj",), "palette4", group_size=16, channel_scale=True),
    QuantizeRule(("*.self_attn.o_proj",), "palette6", group_size=32),
    QuantizeRule(("*.gate_proj",), "palette8", group_size=16, channel_scale=True),
    QuantizeRule(("*.up_proj",), "palette4", group_size=8),
    QuantizeRule(("*.down_proj",), "palette6", group_size=16, channel_scale=True),
    QuantizeRule(("*.embed_tokens",), "palette8", group_size=64),
    QuantizeRule(("vision.stem.0",), "palette6", group_size=8, channel_scale=True),
    QuantizeRule(("*.mixer",), "palette4", group_size=4),
    QuantizeRule(("*.fc1",), "palette4", group_size=16, channel_scale=True),
    QuantizeRule(("*.fc2",), "palette8", group_size=8),
    QuantizeRule(("*.qkv",), "palette6", group_size=1),
    QuantizeRule(("*",), "int8"),
)
DECODER = {
    "l0_qkv": [f"decoder.layers.0.self_attn.{p}_proj" for p in "qkv"],
    "l1_o": ["decoder.layers.1.self_attn.o_proj"],
    "l0_gate": ["decoder.layers.0.mlp.gate_proj"],
    "l1_up": ["decoder.layers.1.mlp.up_proj"],
    "l1_down": ["decoder.layers.1.mlp.down_proj"],
    "embed_tokens": ["decoder.embed_tokens"],
}
VISION = {
    "stem_0": ["vision.stem.0"],
    "s0b0_mixer": ["vision.stages.0.blocks.0.mixer"],
    "s2b1_fc1": ["vision.stages.2.blocks.1.ffn.fc1"],
    "s4b0_fc2": ["vision.stages.4.blocks.0.ffn.fc2"],
    "s3b0_qkv": ["vision.stages.3.blocks.0.attention.qkv"],
    "projector_fc1": ["projector.fc1"],
}
TYPES = {4: types.uint4, 6: types.uint6, 8: types.uint8}


@pytest.fixture(scope="module", params=[FP32, FP16])
def made(request, tmp_path_factory) -> tuple[Path, Recipe]:
    chosen = replace(recipe(request.param, coreml={"kv_cache": "tensors"}), quantize=RULES)
    output = tmp_path_factory.mktemp("palettes") / "bundle"
    export(CHECKPOINT, output, recipe=chosen, targets=["coreml"])
    return output, chosen


@pytest.mark.parametrize(("package", "function", "names"), [
    ("decoder", "decode", DECODER),
    ("decoder", "embed", {"embed_tokens": DECODER["embed_tokens"]}),
    ("vision", "main", VISION),
])  # fmt: skip
def test_core_ml_holds_the_engines_palettes(made, package, function, names):
    bundle, chosen = made
    weights, found = engine(chosen), decompressions(bundle, package, function)
    for name, layers in names.items():
        weight = stacked([weights[f"{layer}.weight"] for layer in layers])
        matrix = weight.matrix()
        operation, values = found[f"{name}_weight"], None
        if matrix.scheme.per_channel_scale:
            assert operation.op_type == "constexpr_blockwise_shift_scale"
            assert operation.offset is None
            values = operation.scale.val
            assert np.array_equal(values.reshape(-1).astype(np.float16), matrix.scale)
            operation = operation.data.op
        assert operation.op_type == "constexpr_lut_to_dense"
        assert operation.indices.dtype == TYPES[matrix.scheme.bits]
        assert operation.indices.shape == weight.shape
        assert np.array_equal(operation.indices.val.reshape(matrix.indices.shape), matrix.indices)
        table = operation.lut.val
        assert np.array_equal(table.reshape(matrix.palette.shape).astype(np.float16), matrix.palette)
        dense = operation.materialized_val_inference().astype(np.float32)
        if values is not None:
            dense = dense * values.astype(np.float32)
        assert np.array_equal(dense.reshape(matrix.indices.shape), matrix.dequantized())


def test_the_lowering_is_exact(made):
    """The interpreter against torch holding the same weights; in fp16 biases and norms are rounded too."""
    bundle, chosen = made
    least = {FP32: 100, FP16: 50}[chosen.name]
    reference = load_engine(open_checkpoint(CHECKPOINT), chosen, 2048).session
    session = load_bundle(bundle, "coreml", "exact").session
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 3, 256, 256)).astype(np.float32) / np.float32(255)
    ids = rng.integers(0, 430, 24)
    embeds = reference.embed(ids)
    assert np.array_equal(embeds, session.embed(ids))
    assert sqnr_db(reference.encode_image(pixels), session.encode_image(pixels)) >= least
    assert sqnr_db(reference.prefill(embeds), session.prefill(embeds)) >= least
    assert sqnr_db(reference.decode(embeds[:1]), session.decode(embeds[:1])) >= least


def test_every_group_is_solved_once(tmp_path, monkeypatch):
    solved = 0

    def counting(weight: np.ndarray, *arguments: object) -> PaletteMatrix:
        nonlocal solved
        solved += len(weight)
        return palettize(weight, *arguments)

    monkeypatch.setattr("fastvlm_convert.quantization.data_free.palettize", counting)
    monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))
    chosen = replace(recipe(FP16), quantize=RULES)
    export(CHECKPOINT, tmp_path / "bundle", recipe=chosen, targets=["coreml"])
    plans = plan_layers(shapes(), chosen)
    assert solved == sum(p.shape[0] for p in plans if isinstance(p.scheme, PaletteScheme))


def test_onnx_has_no_palettes(tmp_path):
    chosen = replace(recipe(FP16), quantize=RULES)
    with pytest.raises(TargetError) as caught:
        export(CHECKPOINT, tmp_path / "bundle", recipe=chosen, targets=["coreml", "onnx"])
    assert "layer 'vision.stem.0' has scheme palette6" in str(caught.value)
    assert "ONNX has int8 and int4" in str(caught.value.hint)
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(TargetError, match=r"'vision.stem.0.weight' is a palette"):
        without_palettes(engine(chosen))


def test_groups_that_do_not_divide_a_layer():
    rules = (
        QuantizeRule(("*.[kv]_proj",), "palette4", group_size=64, on_indivisible="error"),
        QuantizeRule(("*",), "float"),
    )
    with pytest.raises(RecipeError) as caught:
        plan_layers(shapes(), replace(recipe(FP16), quantize=rules))
    assert "fits layer 'decoder.layers.0.self_attn.k_proj'" in str(caught.value)
    assert "its 32 output channels are no multiple of group_size 64" in str(caught.value)
    assert "group_size" in str(caught.value.hint)
    rules = (QuantizeRule(("*.o_proj", "*.fc2"), "palette4", on_indivisible="float"), rules[1])
    plans = {p.layer: p for p in plan_layers(shapes(), replace(recipe(FP16), quantize=rules))}
    assert plans["decoder.layers.0.self_attn.o_proj"].scheme == PaletteScheme(4, 16, per_channel_scale=False)
    narrow = plans["vision.stages.0.blocks.0.ffn.fc2"]
    assert narrow.scheme is None
    assert narrow.reason == "its 8 output channels are no multiple of group_size 16"
