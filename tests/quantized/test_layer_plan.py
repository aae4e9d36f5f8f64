from dataclasses import replace

import pytest

from fastvlm_convert.errors import RecipeError
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.quantized.layer_plan import LayerPlan, plan_layers
from fastvlm_convert.quantized.schemes import AffineScheme, PaletteScheme
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.weights.published import published_config


@pytest.fixture(scope="module")
def shapes():
    weights = placeholder_weights(published_config("0.5b"), ())
    return {name: weight.shape for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("patterns", "question"),
    [
        (["decodr.*"], "did you mean 'decoder.*'? "),
        (["*.selfattn.v_proj"], "did you mean '*.self_attn.v_proj'? "),
        (["decoder.layer.*.mlp.gateproj"], "did you mean 'decoder.layers.*.mlp.gate_proj'? "),
        (["*.q_prj", "*.k_prj"], "did you mean '*.q_proj' and '*.k_proj'? "),
        (["decoder.layers.30.*"], ""),  # there are 24, and no guess is near
        (["language_model.*"], ""),
        (["*.q_proj.gate_proj"], ""),
    ],
)
def test_a_misspelt_pattern_is_guessed(shapes, patterns, question):
    rules = (QuantizeRule(tuple(patterns), "int8"), QuantizeRule(("*",), "float"))
    with pytest.raises(RecipeError, match="fits no layer") as caught:
        plan_layers(shapes, replace(load_recipe("fp16"), quantize=rules))
    assert caught.value.hint.startswith(f"{question}layers are called vision.")


QKV = {f"decoder.layers.0.self_attn.{p}_proj": rows for p, rows in (("q", 96), ("k", 24), ("v", 24))}
PALETTE = QuantizeRule(("*",), "palette4", group_size=16)


def planned(shapes: dict[str, tuple[int, ...]], *rules: QuantizeRule) -> dict[str, LayerPlan]:
    named = {f"{layer}.weight": shape for layer, shape in shapes.items()}
    return {p.layer: p for p in plan_layers(named, replace(load_recipe("fp16"), quantize=rules))}


@pytest.mark.parametrize(
    ("layer", "shape", "asked", "block"),
    [
        ("decoder.x", (8, 256), 128, 128),
        ("decoder.embed_tokens", (40, 576), 128, 64),
        ("decoder.x", (8, 96), 128, 32),
        ("decoder.x", (8, 96), 64, 32),
        ("decoder.x", (8, 176), 32, 16),
        ("vision.x", (8, 176, 1, 1), 64, 16),
        ("vision.x", (8, 24, 1, 1), 64, None),
        ("vision.x", (8, 1, 3, 3), 64, None),
        ("vision.x", (8, 256, 3, 3), 64, None),
        ("projector.x", (8, 200), 128, None),
    ],
)
def test_the_largest_block_that_fits(layer, shape, asked, block):
    plan = planned({layer: shape}, QuantizeRule(("*",), "int4", asked))[layer]
    assert plan.scheme == AffineScheme(4, block, symmetric=True)
    if block == asked:
        assert plan.reason is None
    else:
        assert plan.reason is not None
        assert plan.reason.endswith(f", so {block or 'channel'}")


def test_the_reason_names_width_and_blocks():
    plan = planned({"decoder.embed_tokens": (49152, 576)}, *load_recipe("int4").quantize[:1])
    assert plan["decoder.embed_tokens"].scheme == AffineScheme(8, 64, symmetric=True)
    assert plan["decoder.embed_tokens"].reason == "its width 576 is no multiple of block_size 128, so 64"


@pytest.mark.parametrize("layer", ["decoder.layers.0.mlp.up_proj", "decoder.lm_head", "decoder.embed_tokens"])
def test_without_any_block_the_decoder_stays_in_float(layer):
    """ONNX Runtime's operators for it need blocks of 16 at least (docs/quality.md)."""
    plan = planned({layer: (32, 200)}, QuantizeRule(("*",), "int8", 64, solver="search"))[layer]
    assert (plan.scheme, plan.stored_bits) == (None, 32 * 200 * 16)
    assert plan.reason == (
        "its width 200 is no multiple of block_size 16, the smallest that ONNX Runtime takes in the decoder"
    )
    whole = planned({layer: (32, 200)}, QuantizeRule(("*",), "int8"))[layer]
    assert whole.scheme == AffineScheme(8, None, symmetric=True)


@pytest.mark.parametrize(("rows", "group"), [(64, 16), (24, 12), (8, 8), (22, 11), (17, 1)])
def test_the_largest_group_that_fits(rows, group):
    plan = planned({"vision.x": (rows, 64)}, PALETTE)["vision.x"]
    assert plan.scheme == PaletteScheme(4, group, per_channel_scale=False)
    text = f"its {rows} output channels are no multiple of group_size 16, so {group}"
    assert plan.reason == (None if group == 16 else text)


def test_layers_that_are_stored_together_get_one_group():
    """16 divides the channels of q_proj; 12 those of all three."""
    plans = planned({layer: (rows, 64) for layer, rows in QKV.items()}, PALETTE)
    assert {plan.scheme for plan in plans.values()} == {PaletteScheme(4, 12, per_channel_scale=False)}
    assert plans["decoder.layers.0.self_attn.q_proj"].reason == (
        "k_proj, stored with it, has 24 output channels, no multiple of group_size 16, so 12"
    )
    in_float = planned(
        {layer: (rows, 64) for layer, rows in QKV.items()}, replace(PALETTE, on_indivisible="float")
    )
    assert {plan.scheme for plan in in_float.values()} == {None}


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (QuantizeRule(("*",), "int4", 64), "its width 24 is no multiple of block_size 64"),
        (PALETTE, "its 8 output channels are no multiple of group_size 16"),
    ],
)
def test_other_ways_with_layers_that_do_not_fit(rule, reason):
    shapes = {"vision.x": (8, 24, 1, 1)}
    kept = planned(shapes, replace(rule, on_indivisible="float"))["vision.x"]
    assert (kept.scheme, kept.reason) == (None, reason)
    with pytest.raises(RecipeError, match=reason) as caught:
        planned(shapes, replace(rule, on_indivisible="error"))
    assert "set on_indivisible to smaller or float" in caught.value.hint
