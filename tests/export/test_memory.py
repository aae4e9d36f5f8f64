"""Predicted peaks against peaks measured at 0.5B on Linux (benchmarks/export_cost.py)."""

from dataclasses import replace

import pytest

from fastvlm_convert.export.memory import predicted_peak
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.weights.hollow import hollow_weights
from fastvlm_convert.weights.plan import plan_layers
from fastvlm_convert.weights.published import published_config

CONFIG = published_config("0.5b")
NUM_TOKENS = 151_646
MEASURED = {
    ("fp32", "onnx"): 246_374_400,
    ("fp32", "coreml"): 967_020_544,
    ("fp16", "onnx"): 246_480_896,
    ("fp16", "coreml"): 947_113_984,
    ("int4", "onnx"): 249_659_392,
    ("int4", "coreml"): 586_436_608,
}


def peak(recipe, targets) -> int:
    shapes = {name: weight.shape for name, weight in hollow_weights(CONFIG, ()).items()}
    return predicted_peak(CONFIG, plan_layers(shapes, recipe), recipe, targets, NUM_TOKENS)


@pytest.mark.parametrize(("name", "target"), MEASURED)
def test_peaks_are_those_that_were_measured(name, target):
    assert peak(load_recipe(name), [target]) == pytest.approx(MEASURED[name, target], rel=0.1)


def test_two_targets_need_as_much_as_the_hungrier_one():
    recipe = load_recipe("fp16")
    assert peak(recipe, ["onnx", "coreml"]) == peak(recipe, ["coreml"]) > peak(recipe, ["onnx"])


def test_data_needs_the_reference_beside_it():
    recipe = load_recipe("int4")
    rules = tuple(replace(r, solver="gptq") if r.scheme == "int4" else r for r in recipe.quantize)
    calibrated = peak(replace(recipe, quantize=rules), ["onnx"])
    assert calibrated > peak(recipe, ["onnx"]) + 4 * 620_000_000
    assert calibrated < 6e9
