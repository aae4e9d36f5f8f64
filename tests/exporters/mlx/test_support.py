"""What MLX's loaders cannot take is refused before a weight is read; what they do otherwise is said."""

from dataclasses import replace

import pytest

from fastvlm_convert.errors import TargetError
from fastvlm_convert.exporters.mlx.groups import planned_layers
from fastvlm_convert.exporters.mlx.support import check, notes
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.recipe import Recipe, load_recipe, shipped_recipes
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.published import published_config
from tests.bundles import FP16, recipe

CONFIG = published_config("0.5b")
APP = {"drop_in": True}


def plans(settings: Recipe, config: ModelConfig = CONFIG):
    return plan_layers({n: w.shape for n, w in placeholder_weights(config, ()).items()}, settings)


def with_rules(*rules: QuantizeRule, **sections) -> Recipe:
    return replace(recipe(FP16, **sections), quantize=(*rules, QuantizeRule(("*",), "float")))


TABLE = QuantizeRule(("decoder.embed_tokens",), "int8", 128)
REFUSED = {
    "palettes": (
        with_rules(QuantizeRule(("projector.*",), "palette4")),
        "layer 'projector.fc1' has scheme palette4, but MLX has no tables",
        "int8 and int4 with a block_size of 32, 64 or 128",
    ),
    "bits in the app": (
        with_rules(TABLE, QuantizeRule(("decoder.*",), "int4", 128), coreml=APP),
        "Apple's app takes integers of one width, but 'decoder.embed_tokens' has 8 bits and "
        "'decoder.layers.0.self_attn.q_proj' 4",
        "one number of bits",
    ),
    "groups in the app": (
        with_rules(TABLE, QuantizeRule(("decoder.*",), "int8", 64), coreml=APP),
        "Apple's app takes groups of one size, but the layers have 64 and 128",
        "one block_size of 32, 64 or 128",
    ),
    "operations in float32": (
        recipe(FP16, decoder={"float32_ops": ("l0_attn",)}),
        "decoder.float32_ops is set, which only Core ML packages can follow",
        "decoder.compute to float32",
    ),
    "a scaled residual stream": (
        recipe(FP16, repairs={"residual_shift": 2}),
        "repairs.residual_shift is set, but MLX files hold weights alone",
        "decoder.compute to float32",
    ),
    "scores in float32": (
        recipe(FP16, repairs={"float32_scores": (0,)}),
        "repairs.float32_scores is set",
        "decoder.compute to float32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_is_allowed(name):
    settings, what, allowed = REFUSED[name]
    with pytest.raises(TargetError) as caught:
        check(CONFIG, settings, plans(settings))
    assert what in str(caught.value)
    assert allowed in str(caught.value.hint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 32}, "14 heads of 32, but MLX's Qwen2 divides its width of 896"),
        ({"vocab_size": 151_000}, "the embedding has 151936 rows and the head 151000"),
    ],
)
def test_dimensions_that_mlx_cannot_take(changes, message):
    config = replace(CONFIG, decoder=replace(CONFIG.decoder, **changes))
    with pytest.raises(TargetError, match=message):
        check(config, recipe(FP16), ())
    with pytest.raises(TargetError, match="the projector is 1024 wide inside"):
        check(replace(CONFIG, projector_width=1024), recipe(FP16), ())


def test_recipes_that_ship():
    """The library takes every one without palettes; the app those with one kind of integers, or none."""
    taken, by_app = set(), set()
    for name in shipped_recipes():
        settings = load_recipe(name)
        in_app = replace(settings, coreml=replace(settings.coreml, drop_in=True))
        for found, chosen in ((taken, settings), (by_app, in_app)):
            try:
                check(CONFIG, chosen, plans(chosen))
                found.add(name)
            except TargetError:
                continue
    assert taken == set(shipped_recipes()) - {"ios-ane", "int8-static", "int4-static"}
    assert by_app == {"fp32", "fp16", "int8", "web-small"}


def test_whole_rows_of_the_same_bits_fit_into_the_app():
    rules = (QuantizeRule(("decoder.*",), "int8", 64), QuantizeRule(("projector.*", "vision.*"), "int8"))
    settings = with_rules(*rules, coreml=APP)
    check(CONFIG, settings, plans(settings))


def said(settings: Recipe, config: ModelConfig = CONFIG) -> str:
    return "\n".join(notes(config, settings, planned_layers(plans(settings, config))))


def test_notes_name_what_is_stored_otherwise():
    assert said(recipe(FP16)) == ""
    int4 = load_recipe("int4")
    assert "layers of the encoder are float16" in said(int4)
    assert "168 layers have zero points" in said(int4)
    exact = replace(int4, decoder=replace(int4.decoder, compute="float32"))
    assert "zero points" not in said(exact)
    assert "zero points" not in said(load_recipe("int8"))
    narrow = replace(CONFIG, vision=replace(CONFIG.vision, stages=CONFIG.vision.stages[:1]))
    assert "VisionConfig.layers and embed_dims" in "\n".join(notes(narrow, recipe(FP16), ()))
    assert "mlx-vlm pads pictures" in said(recipe(FP16, common={"image_mode": "crop"}))
