"""Encoders with integer activations, as ONNX Runtime runs them, against the float reference."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from fastvlm_convert.activation_report import ActivationReport
from fastvlm_convert.demo.samples import calibration_samples
from fastvlm_convert.lint.run import lint
from fastvlm_convert.pipeline import plan
from fastvlm_convert.questions import Question
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.verification.bundle import VerifyResult, verify
from tests.bundles import copy_bundle, export_bundle, graph_path, load_graph, manifest_of, open_bundle, recipe
from tests.planted import DEMO
from tests.quantization.calibrated import sqnr
from tests.quantization.planted_channels import float_model, pictures, plainly_quantized, plant

pytestmark = pytest.mark.slow

NUM_SEEN, NUM_JUDGED, NUM_OURS = 16, 4, 6  # pictures of ranges, of the report, and of these tests alone


def settings(activations: str = "int8") -> Recipe:
    """The recipe with just the samples that are used."""
    few = {"num_samples": NUM_SEEN + NUM_JUDGED}
    return recipe("int8-static", vision={"activations": activations}, calibration=few)


@cache
def questions() -> tuple[Question, ...]:
    samples = calibration_samples(NUM_SEEN + NUM_JUDGED + NUM_OURS)
    return tuple(Question((image,), asked.question) for image, asked in samples)


@cache
def unseen(checkpoint: Path) -> torch.Tensor:
    return pictures(checkpoint, questions()[-NUM_OURS:])


def exact_tokens(checkpoint: Path) -> torch.Tensor:
    with torch.no_grad():
        return float_model(checkpoint).encode_image(unseen(checkpoint))


def tokens(bundle: Path, checkpoint: Path) -> torch.Tensor:
    session = open_bundle(bundle).session
    return torch.from_numpy(np.stack([session.encode_image(x[None].numpy()) for x in unseen(checkpoint)]))


def report_of(bundle: Path) -> ActivationReport:
    report = manifest_of(bundle).activations
    assert report is not None
    return report


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(functional.cosine_similarity(a, b, dim=-1).mean())


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory) -> Path:
    return export_bundle(DEMO, tmp_path_factory.mktemp("demo") / "bundle", settings())


@pytest.fixture(scope="module")
def planted_bundle(planted, tmp_path_factory) -> Path:
    return export_bundle(planted, tmp_path_factory.mktemp("demo") / "bundle", settings())


class TestAccuracy:
    def test_the_demo_keeps_its_image_tokens(self, demo_bundle):
        assert cosine(tokens(demo_bundle, DEMO), exact_tokens(DEMO)) >= 0.999
        report = report_of(demo_bundle)
        assert report.float_share <= 0.1
        assert report.cosine >= 0.999
        assert report.bits == 8

    def test_every_layer_that_stays_float_is_named_with_its_reason_and_share(self, demo_bundle):
        report = report_of(demo_bundle)
        named = {layer.layer: layer for layer in report.float_layers}
        assert all(layer.reason for layer in report.float_layers)
        assert sum(layer.share for layer in report.float_layers) == pytest.approx(
            report.float_share, abs=1e-3
        )
        assert "attention" in named["vision.stages.3.blocks.0.attention"].reason
        # What the graph rounds and what is named are all layers of the encoder, each in one of them.
        graph = load_graph(demo_bundle, "vision").graph
        rounded = {n.output[0] for n in graph.node if n.op_type == "QuantizeLinear"}
        assert len([name for name in rounded if name.endswith("_input_integers")]) == report.num_layers
        layers = plan(DEMO, recipe=settings(), targets="onnx").plan.layers
        in_encoder = [p for p in layers if p.layer.startswith(("vision.", "projector."))]
        products = [name for name in named if name.endswith(".attention")]
        assert len(named) - len(products) + report.num_layers == len(in_encoder)

    def test_plain_quantization_ruins_planted_channels(self, planted):
        seen = pictures(planted, questions()[:NUM_SEEN])
        plain = plainly_quantized(float_model(planted), seen, unseen(planted))
        assert sqnr(exact_tokens(planted), plain) < 15

    def test_equalization_repairs_planted_channels_exactly(self, planted, planted_bundle, demo_bundle):
        """Scales found by us, not planted: the planted encoder becomes the demo's, integer by integer."""
        ours = tokens(planted_bundle, planted)
        assert cosine(ours, exact_tokens(planted)) >= 0.999
        report, of_demo = report_of(planted_bundle), report_of(demo_bundle)
        assert report.num_equalized == of_demo.num_equalized == 10
        assert report.float_share <= 0.1
        assert sqnr(exact_tokens(DEMO), ours) == pytest.approx(
            sqnr(exact_tokens(DEMO), tokens(demo_bundle, DEMO)), abs=0.5
        )

    def test_scales_are_no_forgotten_float32_weights(self, demo_bundle):
        assert "float32-in-float16" not in {finding.id for finding in lint(demo_bundle).findings}

    def test_16_bits_keep_more(self, demo_bundle, tmp_path):
        bundle = export_bundle(DEMO, tmp_path / "bundle", settings("int16"))
        ours, exact = tokens(bundle, DEMO), exact_tokens(DEMO)
        assert report_of(bundle).bits == 16
        assert cosine(ours, exact) >= 0.9999
        assert sqnr(exact, ours) > sqnr(exact, tokens(demo_bundle, DEMO)) + 1
        graph = load_graph(bundle, "vision").graph
        zeros = {t.name: t.data_type for t in graph.initializer if t.name.endswith("_zero_point")}
        assert set(zeros.values()) == {onnx.TensorProto.UINT16}
        checked = verify(bundle, DEMO, questions=questions()[:1])
        assert checked.status == "passed"


class TestVerify:
    def test_the_reference_follows_what_the_runtime_rounds(self, demo_bundle):
        checked = verify(demo_bundle, DEMO, questions=questions()[-2:])
        assert checked.status == "passed"
        assert followed(checked) >= 70  # as near as floats are

    @pytest.mark.parametrize("what", ["scale", "bias"])
    def test_a_small_error_in_one_layer_fails(self, demo_bundle, what, tmp_path):
        bundle = copy_bundle(demo_bundle, tmp_path)
        change_layer(bundle, what)
        checked = verify(bundle, DEMO, questions=questions()[-1:])
        assert followed(checked) < 50
        assert checked.status == "failed"


def followed(result: VerifyResult) -> float:
    (value,) = [c.value for c in result.checks if c.metric == "followed_sqnr_db"]
    assert value is not None
    return value


def change_layer(bundle: Path, what: str) -> None:
    """Change a scale of one layer in the middle by little."""
    path = graph_path(bundle, "vision")
    model = onnx.load(path, load_external_data=False)
    name = {"scale": "s2b0_fc1_scale", "zero_point": "s2b0_fc1_zero_point", "bias": "s2b0_fc1_bias_scale"}[
        what
    ]
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    value = onnx.numpy_helper.to_array(tensor)
    changed = (value * 1.03).astype(value.dtype)
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, name))
    onnx.save(model, path)
