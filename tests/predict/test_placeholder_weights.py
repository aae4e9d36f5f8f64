import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.quantization.prepared_weights import prepare_weights
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.recipe import load_recipe, without_data
from tests.test_recipe import DEMO


@pytest.mark.parametrize("name", ["fp16", "int4"])
def test_they_look_like_the_engines_weights(name):
    checkpoint, recipe = open_checkpoint(DEMO), without_data(load_recipe(name))
    plan = plan_weights(checkpoint, recipe)
    real = prepare_weights(plan).weights
    hollow = placeholder_weights(plan.config, plan.layers)
    assert list(hollow) == list(real)
    for name, weight in real.items():
        assert type(hollow[name]) is type(weight)
        assert hollow[name].shape == weight.shape
        assert getattr(hollow[name], "scheme", None) == getattr(weight, "scheme", None)


def test_nothing_can_be_read_of_them():
    checkpoint = open_checkpoint(DEMO)
    plan = plan_weights(checkpoint, load_recipe("int4"))
    weights = placeholder_weights(plan.config, plan.layers)
    for name in ("decoder.norm.weight", "projector.fc1.weight"):
        with pytest.raises(AssertionError, match="without content"):
            weights[name].read(0, 1)
