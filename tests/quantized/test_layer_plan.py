from dataclasses import replace

import pytest

from fastvlm_convert.errors import RecipeError
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.recipe import QuantizeRule, load_recipe
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
