from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from fastvlm_convert import metrics
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.generate import generate
from fastvlm_convert.model.fastvlm import FastVLM, load_model
from fastvlm_convert.model.session import TorchSession
from fastvlm_convert.pictures import load_image
from fastvlm_convert.runtime.loaded import load_reference
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.model_config import at_image_size
from tests.bundles import FP16, export_bundle, graph_path, load_graph, open_bundle, recipe
from tests.checkpoints import GOLDEN, HF, LLAVA, golden_cases, golden_checkpoint, golden_model
from tests.exporters.onnx.conftest import Variant

FLOAT = TensorProto.FLOAT
CASES = [case for case in golden_cases() if case.name in (LLAVA, HF)]


def noise(size: int, count: int = 1) -> np.ndarray:
    return np.random.default_rng(size).random((count, 3, size, size), np.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_image_tokens_are_those_of_the_original_code(variants, case):
    bundle = variants("fp32" if case.name == LLAVA else "hf").bundle
    golden = case.array("image_tokens")[0]
    found = open_bundle(bundle).session.encode_image(case.array("pixel_values"))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, golden, rtol=0, atol=1e-4 * max(1.0, np.abs(golden).max()))


@pytest.mark.parametrize("name", ["fp32", "hf", "own_table", "untied", "cut"])
def test_float32_equals_the_reference(variants, name):
    variant: Variant = variants(name)
    reference, candidate = variant.reference(), open_bundle(variant.bundle)
    pixels = noise(reference.images.size)
    expected, found = reference.session.encode_image(pixels), candidate.session.encode_image(pixels)
    assert expected.shape == found.shape == (reference.session.num_image_tokens, expected.shape[1])
    assert metrics.sqnr_db(expected, found) >= 100


def rounded_reference(size: int) -> FastVLM:
    """The golden's model with its folded weights rounded to float16, computing in float32."""
    checkpoint = golden_checkpoint(LLAVA)
    model = load_model(at_image_size(checkpoint.config, size), fold(checkpoint.weights), folded=True)
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    return model


@pytest.mark.parametrize("name", ["fp16", "mixed"])
def test_stored_as_float16_it_equals_the_reference_with_the_weights_it_stores(variants, name):
    """Only the lowering is judged: rounding the weights alone costs this random net 50 dB."""
    loaded = open_bundle(variants(name).bundle)
    pixels = noise(loaded.images.size)
    found = loaded.session.encode_image(pixels)
    expected = TorchSession(rounded_reference(loaded.images.size), 64).encode_image(pixels)
    assert metrics.sqnr_db(expected, found) >= 100
    exact = variants(name).reference().session.encode_image(pixels)
    assert 40 < metrics.sqnr_db(exact, found) < 70


def test_another_image_size_is_a_recipe_choice(tmp_path):
    """The golden of 256 pixels, exported for 320: 25 tokens instead of 16."""
    settings = recipe(common={"image_size": 320})
    checkpoint = GOLDEN / LLAVA / "checkpoint"
    loaded = open_bundle(export_bundle(checkpoint, tmp_path / "bundle", settings))
    assert (loaded.images.size, loaded.session.num_image_tokens) == (320, 25)
    opened = open_checkpoint(checkpoint)
    reference = load_reference(opened, replace(opened.pictures.image, size=320))
    image = load_image(CASES[0].image)
    ours, theirs = (model.prompt("Describe the image.", [image]) for model in (loaded, reference))
    np.testing.assert_array_equal(ours.images[0], theirs.images[0])
    expected = reference.session.encode_image(theirs.images[0])
    assert metrics.sqnr_db(expected, loaded.session.encode_image(ours.images[0])) >= 100
    answers = [generate(m.session, p, (), 16).token_ids for m, p in ((loaded, ours), (reference, theirs))]
    assert answers[0] == answers[1]


def test_several_images_at_once(variants):
    path = graph_path(variants("fp32").bundle, "vision")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = noise(256, 2)
    (together,) = session.run(None, {"pixel_values": pixels})
    apart = np.concatenate([session.run(None, {"pixel_values": pixels[i : i + 1]})[0] for i in range(2)])
    assert together.shape == (32, 64)
    np.testing.assert_allclose(together, apart, atol=1e-5)


def test_nothing_is_left_of_batch_norm_and_layer_scale(variants):
    kinds = {node.op_type for node in load_graph(variants("fp32").bundle, "vision").graph.node}
    assert kinds == {
        "Conv", "Gelu", "Add", "Mul", "Relu", "Sigmoid", "GlobalAveragePool", "FusedMatMul",
        "MultiHeadAttention", "LayerNormalization", "Split", "Reshape", "Transpose",
    }  # fmt: skip


def test_ops_have_the_names_that_every_target_uses(variants):
    names = {node.name for node in load_graph(variants("fp32").bundle, "vision").graph.node}
    assert {"stem_0", "s0b0_mixer", "s2b1_fc1", "s3b0_attn", "s4_position", "projector_fc2"} <= names


def test_float16_arithmetic_stays_close(tmp_path):
    """No shipped recipe computes the encoder in float16, but one's own may; its borders stay float32."""
    settings = recipe(FP16, vision={"compute": "float16"})
    bundle = export_bundle(GOLDEN / LLAVA / "checkpoint", tmp_path / "bundle", settings)
    graph = load_graph(bundle, "vision").graph
    assert graph.input[0].type.tensor_type.elem_type == graph.output[0].type.tensor_type.elem_type == FLOAT
    pixels = noise(256)
    found = open_bundle(bundle).session.encode_image(pixels)
    expected = TorchSession(golden_model(LLAVA), 64).encode_image(pixels)
    assert 40 < metrics.sqnr_db(expected, found) < 70
