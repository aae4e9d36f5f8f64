"""Files that did not shrink as planned are refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm_convert.errors import TargetError
from fastvlm_convert.manifest import Manifest, load_manifest
from fastvlm_convert.pipeline import export
from fastvlm_convert.predict.size_check import STRUCTURE, check_sizes
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.recipe_settings import QuantizeRule
from tests.bundles import FP16, recipe
from tests.exporters.stored import CHECKPOINT, shapes

VISION = "coreml/vision.mlpackage/Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Manifest, dict[str, int]]:
    bundle = tmp_path_factory.mktemp("coverage") / "bundle"
    manifest = export(CHECKPOINT, bundle, recipe=recipe(FP16), targets=["onnx", "coreml"]).manifest
    return bundle, manifest, {name: entry.size for name, entry in manifest.files.items()}


def test_what_was_planned_passes(made):
    bundle, manifest, sizes = made
    check_sizes(bundle, load_manifest(bundle).artifacts, sizes)
    check_sizes(bundle, manifest.artifacts, {n: int(1.009 * size) + STRUCTURE for n, size in sizes.items()})


def test_weights_that_stayed_in_float_are_found(made):
    """The plan quantizes the encoder to int4, as far as blocks go; the file holds float16."""
    bundle, manifest, sizes = made
    pointwise = ("vision.*.fc1", "vision.*.fc2", "*.qkv", "*.proj", "projector.*")
    rules = (
        QuantizeRule(pointwise, "int4", 16, on_indivisible="float"),
        QuantizeRule(("*",), "float"),
    )
    plans = plan_layers(shapes(), replace(recipe(FP16), quantize=rules))
    planned = sum(plan.stored_bits for plan in plans if not plan.layer.startswith("decoder.")) // 8
    assert planned < 0.6 * sizes[VISION]
    with pytest.raises(TargetError) as caught:
        check_sizes(bundle, manifest.artifacts, {**sizes, VISION: planned})
    assert f"{sizes[VISION]:,} bytes of weights, the plan says {planned:,}" in str(caught.value)
    assert VISION in str(caught.value)
    assert "not stored as the recipe asks" in str(caught.value.hint)


def test_files_that_shrank_too_much_are_found(made):
    bundle, manifest, sizes = made
    data = "onnx/decoder_model_merged_fp16.onnx_data"
    with pytest.raises(TargetError, match=data):
        check_sizes(bundle, manifest.artifacts, {**sizes, data: sizes[data] + STRUCTURE + sizes[data] // 50})


def test_every_file_of_weights_needs_a_plan(made):
    bundle, manifest, sizes = made
    del sizes[VISION]
    with pytest.raises(TargetError, match="no size was planned"):
        check_sizes(bundle, manifest.artifacts, sizes)
