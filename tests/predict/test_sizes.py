"""Predicted sizes of Core ML packages; those of ONNX files and quantized bundles are tested beside them."""

from dataclasses import replace
from typing import NoReturn

import coremltools
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813  coremltools' own convention
from coremltools.converters.mil.mil import types

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.exporters.coreml.graph import Graph
from fastvlm_convert.exporters.coreml.metadata import Metadata
from fastvlm_convert.exporters.coreml.ops import conv
from fastvlm_convert.exporters.coreml.proto_size import package_bytes
from fastvlm_convert.pipeline import export
from fastvlm_convert.predict.export_plan import plan_export, predicted_artifacts
from fastvlm_convert.predict.sizes import cache_bytes
from fastvlm_convert.quantized.schemes import PaletteScheme
from fastvlm_convert.quantized.weight import PaletteWeight
from fastvlm_convert.recipe_settings import FloatSettings, QuantizeRule
from fastvlm_convert.weights.published import published_config
from fastvlm_convert.weights.source import Weight
from tests.bundles import FP16, FP32, check_sizes, recipe
from tests.checkpoints import GOLDEN, LLAVA, SHARDED

ANY_BLOCKS = (
    QuantizeRule(("decoder.*", "vision.*.fc1", "vision.*.qkv"), "int4", 16, on_indivisible="float"),
    QuantizeRule(("*",), "int8"),
)

HALF = {"storage": "float16"}
VARIANTS = {
    "untied": (SHARDED, recipe(FP16, common={"max_context_length": 512})),
    "one_function": (LLAVA, recipe(FP16, coreml={"sequence_lengths": "range", "prefill_chunk": 8})),
    "float16_storage": (LLAVA, recipe(FP32, decoder=HALF, embed=HALF, vision=HALF)),
    "repaired": (
        LLAVA,
        recipe(
            FP16,
            repairs={
                "residual_shift": 3,
                "rescaled_keys": (0,),
                "float32_scores": (0,),
                "separate_key_bias": (1,),
            },
        ),
    ),
    # Scales have the dtype of the operation that reads them.
    "float32_operations": (
        LLAVA,
        replace(
            recipe(
                FP16,
                vision={"compute": "float16", "float32_ops": ("s4b0_fc1", "s3b0_qkv", "stem_2")},
                decoder={"float32_ops": ("l0_gate", "l1_qkv")},
            ),
            quantize=ANY_BLOCKS,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_sizes_of_core_ml_packages_are_known_before(name, tmp_path):
    golden, settings = VARIANTS[name]
    checkpoint = GOLDEN / golden / "checkpoint"
    plan = plan_export(open_checkpoint(checkpoint), settings, ["coreml"])
    made = export(checkpoint, tmp_path / "bundle", recipe=settings, targets=["coreml"])
    predicted = predicted_artifacts(plan)
    check_sizes(predicted.sizes, tmp_path / "bundle")
    assert tuple(predicted.artifacts) == made.manifest.artifacts


@pytest.mark.parametrize("channel_scale", [False, True])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_palettes_are_as_long_as_coremltools_writes_them(bits, channel_scale, tmp_path):
    """The constants of one 1x1 convolution, written by coremltools."""
    rows, columns, group = 40, 24, 8
    kind = {4: types.np_uint4_dtype, 6: types.np_uint6_dtype, 8: np.uint8}[bits]

    @mb.program(
        input_specs=[mb.TensorSpec((1, columns, 4, 4), types.fp16)], opset_version=coremltools.target.iOS18
    )
    def program(x):
        weight = mb.constexpr_lut_to_dense(
            indices=np.zeros((rows, columns, 1, 1), np.uint8).view(kind),
            lut=np.zeros((5, 1, 1, 1, 2**bits, 1), np.float16),
        )
        if channel_scale:
            scale = np.ones((rows, 1, 1, 1), np.float16)
            weight = mb.constexpr_blockwise_shift_scale(data=weight, scale=scale)
        return mb.conv(x=x, weight=weight, bias=np.ones(rows, np.float16))

    package = coremltools.convert(
        program, minimum_deployment_target=coremltools.target.iOS18, skip_model_load=True,
        pass_pipeline=coremltools.PassPipeline.EMPTY,
    )  # fmt: skip
    package.save(str(tmp_path / "p.mlpackage"))
    (written,) = tmp_path.rglob("weight.bin")

    scheme = PaletteScheme(bits, group, channel_scale)
    graph = Graph("main", {}, FloatSettings("float16", "float16"), lambda count: None)
    x = graph.input("x", "float16", (1, columns, 4, 4))
    kernel = PaletteWeight((rows, columns, 1, 1), scheme, unread)
    graph.output(conv(graph, "conv", x, (kernel, Weight((rows,), "float32", unread))))
    metadata = Metadata("", "", {}, {"x": "", "conv": ""})
    assert package_bytes([graph], metadata)[1] == written.stat().st_size


def unread(start: int, stop: int) -> NoReturn:
    raise AssertionError("a prediction reads no weight")


def test_a_kv_cache_is_float16_in_core_ml_and_the_decoders_dtype_in_onnx():
    config = published_config("0.5b")
    token = 2 * 24 * 2 * 64  # keys and values, layers, heads, width
    assert cache_bytes(config, recipe(FP16), "onnx", 1000) == 2 * token * 1000
    assert cache_bytes(config, recipe(FP32), "onnx", 1000) == 4 * token * 1000
    assert cache_bytes(config, recipe(FP32), "coreml", 1000) == 2 * token * 1000
    as_tensors = recipe(FP32, coreml={"kv_cache": "tensors"})
    assert cache_bytes(config, as_tensors, "coreml", 1000) == 4 * token * 1000


def test_a_pattern_that_matches_no_operation_is_known_before():
    settings = recipe(FP16, decoder={"float32_ops": ("l0_gaet",)})
    plan = plan_export(open_checkpoint(GOLDEN / LLAVA / "checkpoint"), settings, ["coreml"])
    with pytest.raises(RecipeError, match=r"decoder\.float32_ops: 'l0_gaet' matches no operation"):
        predicted_artifacts(plan)
