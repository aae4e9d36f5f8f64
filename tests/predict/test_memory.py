"""Predicted peaks against peaks measured at 0.5B on Linux (benchmarks/export_cost.py)."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.predict.export_plan import plan_export
from fastvlm_convert.predict.memory import stage_needs
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.recipe import load_recipe, without_data
from fastvlm_convert.weights.published import published_config

DEMO = Path(__file__).parents[2] / "checkpoints" / "fastvlm-demo"
CONFIG = published_config("0.5b")
NUM_TOKENS = 151_646
MEASURED = {
    ("fp32", "onnx"): 246_374_400,
    ("fp32", "coreml"): 967_020_544,
    ("fp16", "onnx"): 246_480_896,
    ("fp16", "coreml"): 947_113_984,
    ("int4", "onnx"): 249_659_392,
    ("int4", "coreml"): 586_436_608,
    ("fp16", "mlx"): 254_222_336,
    ("int8", "mlx"): 252_477_440,
}


def highest(*given) -> int:
    return max(need.peak_memory_bytes for need in stage_needs(*given))


def peak(recipe, targets) -> int:
    shapes = {name: weight.shape for name, weight in placeholder_weights(CONFIG, ()).items()}
    return highest(CONFIG, plan_layers(shapes, recipe), recipe, targets, NUM_TOKENS)


@pytest.mark.parametrize(("name", "target"), MEASURED)
def test_peaks_are_those_that_were_measured(name, target):
    assert peak(without_data(load_recipe(name)), [target]) == pytest.approx(MEASURED[name, target], rel=0.1)


def test_two_targets_need_as_much_as_the_hungrier_one():
    recipe = load_recipe("fp16")
    assert peak(recipe, ["onnx", "coreml"]) == peak(recipe, ["coreml"]) > peak(recipe, ["onnx"])


# The demo, whose own tokens are few; one thread.
CALIBRATED = {
    ("int4", 256): 762_000_000,
    ("int4", 512): 1_100_000_000,
    ("int4-small", 256): 1_245_626_368,
    ("int4-small", 512): 3_500_000_000,
}


@pytest.mark.parametrize(("name", "size"), CALIBRATED)
def test_peaks_with_data_are_near_those_that_were_measured(name, size):
    settings = load_recipe(name)
    settings = replace(settings, common=replace(settings.common, image_size=size))
    plan = plan_export(open_checkpoint(DEMO), settings, ["onnx"])
    tokens = plan.checkpoint.tokenizer.num_tokens
    found = highest(plan.config, plan.layers, plan.recipe, ["onnx"], tokens)
    assert found == pytest.approx(CALIBRATED[name, size], rel=0.2)


def test_data_needs_the_reference_beside_it():
    recipe = load_recipe("int4")
    assert peak(without_data(recipe), ["onnx"]) + 4 * 620_000_000 < peak(recipe, ["onnx"]) < 7.5e9


def test_more_data_needs_more():
    recipe = load_recipe("int4-small")
    many = replace(recipe, calibration=replace(recipe.calibration, num_samples=128))
    assert peak(many, ["onnx"]) > 1.05 * peak(recipe, ["onnx"])
