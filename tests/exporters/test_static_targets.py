"""An encoder with integer activations, exported to both targets that take it: one set of integers."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.models.utils import load_spec

from fastvlm_convert import metrics
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.demo.samples import calibration_samples
from fastvlm_convert.estimate.workload import target_work
from fastvlm_convert.exporters.coreml.paths import FILES, VISION_PACKAGE
from fastvlm_convert.lint.run import lint
from fastvlm_convert.model.encoder import Encoder, multiplications
from fastvlm_convert.pipeline import export
from fastvlm_convert.preprocess import pixel_values
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.coreml_session import CoreMLSession
from fastvlm_convert.runtime.coreml_values import encoder_integers as coreml_integers
from fastvlm_convert.runtime.loaded import load_bundle
from fastvlm_convert.runtime.onnx_values import encoder_integers as onnx_integers
from fastvlm_convert.verification.bundle import VerifyResult, verify
from fastvlm_convert.weights.fold import fold
from tests.bundles import copy_bundle, manifest_of, recipe
from tests.planted import DEMO

pytestmark = pytest.mark.slow

NUM_SEEN, NUM_OURS = 20, 3  # pictures of ranges, and of these tests alone
SETTINGS = recipe("int8-static", calibration={"num_samples": NUM_SEEN})
LAYER = "s2b0_fc1"  # in the middle


@cache
def questions() -> tuple[Question, ...]:
    samples = calibration_samples(NUM_SEEN + NUM_OURS)[-NUM_OURS:]
    return tuple(Question((image,), asked.question) for image, asked in samples)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("static") / "bundle"
    export(DEMO, output, recipe=SETTINGS, targets=["onnx", "coreml"])
    return output


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory) -> Path:
    """What lies between layers with integers in float16, as the Neural Engine has it."""
    output = tmp_path_factory.mktemp("static") / "half"
    settings = recipe("int8-static", vision={"compute": "float16"}, calibration={"num_samples": NUM_SEEN})
    export(DEMO, output, recipe=settings, targets=["coreml"])
    return output


@pytest.fixture(scope="module")
def encoded(bundle) -> list[tuple[tuple[dict, np.ndarray], tuple[dict, np.ndarray]]]:
    """Integers and image tokens of some pictures, of both targets."""
    manifest, session = manifest_of(bundle), load_bundle(bundle, "coreml").session
    assert isinstance(session, CoreMLSession)
    pixels = [pixel_values(q.images[0], manifest.contract.images) for q in questions()]
    return [(onnx_integers(bundle, manifest, x), coreml_integers(session, x)) for x in pixels]


def test_both_targets_round_the_same_values_to_the_same_integers(encoded):
    for (onnx, _), (coreml, _) in encoded:
        assert set(onnx) == set(coreml)
        # The first layer reads equal pixels; what it gives may go either way from the middle. Deeper layers
        # read what such steps have moved.
        np.testing.assert_array_equal(onnx["stem_0_input_integers"], coreml["stem_0_input_integers"])
        off = np.abs(onnx["stem_0_integers"].astype(int) - coreml["stem_0_integers"])
        assert off.max() <= 1
        assert off.mean() < 0.001


def test_both_targets_give_nearly_the_same_image_tokens(encoded):
    cosines = [metrics.cosine_similarity(a, b) for (_, a), (_, b) in encoded]
    assert min(c for c in cosines if c is not None) >= 0.9999


def test_both_targets_pass(bundle):
    checked = verify(bundle, DEMO, questions=questions()[:1])
    assert checked.status == "passed"
    assert set(followed(checked)) == {"onnx", "coreml"}
    assert min(followed(checked).values()) >= 70  # as near as floats are


def test_float16_between_the_integers_passes_too(bundle, half_bundle):
    checked = verify(half_bundle, DEMO, questions=questions()[:1])
    assert checked.status == "passed"
    exact, device = (c.value for c in checked.checks if c.metric == "followed_sqnr_db")
    assert exact is not None
    assert device is not None
    assert exact >= 70 > 60 <= device
    # With the same scales: float16 holds them.
    (of_both, of_half) = (stored_scales(each) for each in (bundle, half_bundle))
    assert of_both == of_half
    assert len(of_both) > 40


def test_a_wrong_scale_between_float16_fails(half_bundle, tmp_path):
    broken = copy_bundle(half_bundle, tmp_path)
    edit_constants(broken, widen_scale)
    checked = verify(broken, DEMO, questions=questions()[:1])
    (exact,) = (c for c in checked.checks if c.metric == "followed_sqnr_db" and "exact" in str(c.executed_by))
    assert exact.status == checked.status == "failed"


def test_both_are_estimated_and_multiply_as_often(bundle):
    checkpoint = open_checkpoint(DEMO)
    floats = Encoder(checkpoint.config, fold(checkpoint.weights))
    size = checkpoint.config.vision.image_size
    counted = sum(multiplications(floats, torch.zeros(1, 3, size, size)).values())
    manifest = manifest_of(bundle)
    for target in ("onnx", "coreml"):
        assert target_work(bundle, manifest, target).vision.macs == counted


def test_biases_in_steps_of_products_are_no_forgotten_float32_weights(bundle):
    assert "float32-in-float16" not in {finding.id for finding in lint(bundle).findings}


@pytest.mark.parametrize("value", ["scale", "zero_point", "swapped"])
def test_a_small_error_of_one_layer_in_the_package_fails(bundle, value, tmp_path):
    broken = copy_bundle(bundle, tmp_path)
    edit_constants(broken, PLANTED[value])
    checked = verify(broken, DEMO, questions=questions()[:1])
    assert checked.status == "failed"
    sqnr = followed(checked)
    assert sqnr["coreml"] < 50 < sqnr["onnx"]


def followed(result: VerifyResult) -> dict[str, float]:
    return {
        c.target: c.value for c in result.checks if c.metric == "followed_sqnr_db" and c.value is not None
    }


def program_of(bundle: Path) -> tuple[Any, dict[str, Any]]:
    """The message of a vision package, and the constants in it, tensors by name."""
    spec = load_spec(str(bundle / VISION_PACKAGE / FILES[1]))
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    constants = [o for o in block.operations if o.type == "const"]
    return spec, {o.outputs[0].name: o.attributes["val"].immediateValue.tensor for o in constants}


def edit_constants(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the constants of a vision package."""
    spec, constants = program_of(bundle)
    change(constants)
    (bundle / VISION_PACKAGE / FILES[1]).write_bytes(spec.SerializeToString())


def scale_of(tensor: Any) -> float:
    """A number of float32 or, in bytes, of float16."""
    if tensor.WhichOneof("value") == "floats":
        return float(tensor.floats.values[0])
    return float(np.frombuffer(tensor.bytes.values, np.float16)[0])


def stored_scales(bundle: Path) -> dict[str, float]:
    """Of every layer that rounds."""
    _, constants = program_of(bundle)
    return {name: scale_of(t) for name, t in constants.items() if name.endswith("_integers_scale_0")}


def widen_scale(constants: dict[str, Any]) -> None:
    """As a quantizer and a dequantizer that agree would: only the reference can tell."""
    for name in (f"{LAYER}_integers_scale_0", f"{LAYER}_scale_0"):
        tensor = constants[name]
        wider = 1.03 * scale_of(tensor)
        if tensor.WhichOneof("value") == "floats":
            tensor.floats.values[0] = wider
        else:
            tensor.bytes.values = np.float16(wider).tobytes()


def shift_zero_point(constants: dict[str, Any]) -> None:
    points = constants[f"{LAYER}_input_integers_zero_point_0"].bytes
    points.values = (np.frombuffer(points.values, np.int8) + np.int8(1)).tobytes()


def swap_zero_points(constants: dict[str, Any]) -> None:
    """Let the layer read with the zero point of what it gives, and the other way round."""
    for part in ("_integers", ""):
        read = constants[f"{LAYER}_input{part}_zero_point_0"].bytes
        given = constants[f"{LAYER}{part}_zero_point_0"].bytes
        read.values, given.values = given.values, read.values


PLANTED = {"scale": widen_scale, "zero_point": shift_zero_point, "swapped": swap_zero_points}
