"""Each rule about Core ML: a bundle that breaks it, one that does not, and where it applies."""

import pytest

from fastvlm_convert.lint.platform import Platform
from tests.bundles import edit_manifest, recipe
from tests.lint.conftest import applies, edit_program, found, integers, palettes

ON_26 = Platform(ios=(26,))
ON_18 = Platform(ios=(18,))
NEURAL = Platform(compute_units="cpuAndNeuralEngine")
GPU = Platform(compute_units="cpuAndGPU")
NEURAL_26 = Platform(ios=(26,), compute_units="all")
DECODER, VISION = "coreml/decoder.mlpackage", "coreml/vision.mlpackage"


def severities(findings):
    return {finding.where: finding.severity for finding in findings}


class TestFusedAttention:
    RULE = "coreml-fused-attention"

    def test_it_is_found_in_both_packages(self, make):
        bundle = make("coreml", recipe("fp16"))
        assert severities(found(bundle, self.RULE, ON_26)) == {VISION: "error", DECODER: "error"}
        assert severities(found(bundle, self.RULE)) == {VISION: "warning", DECODER: "warning"}
        messages = [finding.message for finding in found(bundle, self.RULE, ON_26)]
        assert "fused attention: 2 (l0_attn, l1_attn)" in messages
        assert not applies(bundle, self.RULE, ON_18)

    def test_products_and_a_softmax_are_none(self, make):
        bundle = make("coreml", recipe("fp16", coreml={"attention": "decomposed"}))
        assert found(bundle, self.RULE, ON_26) == []


class TestWideQuantized:
    RULE = "coreml-wide-quantized"

    @pytest.mark.parametrize(("width", "count"), [(8064, 0), (8065, 1)])
    def test_an_edge_is_measured(self, make, copy, width, count):
        bundle = copy(make("coreml", integers()))

        def widen(program):
            for name in ("decode", "prefill"):
                block = program.mlProgram.functions[name].block_specializations["CoreML8"]
                weight = next(o for o in block.operations if o.type == "constexpr_blockwise_shift_scale")
                weight.outputs[0].type.tensorType.dimensions[0].constant.size = width

        edit_program(bundle, "decoder", widen)
        assert len(found(bundle, self.RULE, ON_26)) == count
        assert not applies(bundle, self.RULE, ON_18)


class TestBlocksOnTheNeuralEngine:
    RULE = "coreml-ane-blocks"

    def test_blocks_are_found(self, make):
        bundle = make("coreml", integers())
        assert severities(found(bundle, self.RULE, NEURAL)) == {DECODER: "error"}
        assert severities(found(bundle, self.RULE)) == {DECODER: "warning"}
        assert not applies(bundle, self.RULE, GPU)

    def test_whole_rows_are_none(self, make):
        assert found(make("coreml", integers("int8", "channel")), self.RULE, NEURAL) == []

    def test_palettes_are_none(self, make):
        assert found(make("coreml", palettes(channel_scale=True)), self.RULE, NEURAL) == []


class TestPalettesOnTheNeuralEngine:
    RULE = "coreml-ane-palettes"

    def test_four_bits_with_states_are_found(self, make):
        bundle = make("coreml", palettes())
        assert severities(found(bundle, self.RULE, NEURAL_26)) == {DECODER: "warning"}
        assert not applies(bundle, self.RULE, GPU)
        assert not applies(bundle, self.RULE, Platform(ios=(18,), compute_units="all"))

    def test_more_bits_are_none(self, make):
        assert found(make("coreml", palettes(bits=6)), self.RULE, NEURAL_26) == []

    def test_the_older_converter_was_not_reported(self, make, copy):
        bundle = copy(make("coreml", palettes()))
        edit_manifest(bundle, lambda m: m["libraries"].update(coremltools="8.3.0"))
        assert found(bundle, self.RULE, NEURAL_26) == []


def test_palettes_with_a_scale_per_channel_are_found(make):
    rule = "coreml-ane-scaled-palettes"
    assert severities(found(make("coreml", palettes(channel_scale=True)), rule)) == {DECODER: "warning"}
    assert found(make("coreml", palettes()), rule, NEURAL_26) == []


def test_gathers_are_noted(make):
    findings = found(make("coreml", palettes()), "coreml-ane-gather", NEURAL)
    assert severities(findings) == {DECODER: "info"}
    assert "embed" in findings[0].message
    assert not applies(make("coreml", palettes()), "coreml-ane-gather", GPU)


class TestIntegerActivations:
    RULE = "coreml-int8-activations"

    def test_they_are_found_wherever_floats_are_computed_in_float32(self, make):
        bundle = make("coreml", recipe("int8-static", calibration={"num_samples": 2}))
        for platform in (NEURAL, GPU, ON_18):
            assert severities(found(bundle, self.RULE, platform)) == {VISION: "warning"}
        (finding,) = found(bundle, self.RULE, NEURAL)
        assert "float32 arithmetic" in finding.message

    def test_integer_weights_alone_are_none(self, make):
        assert found(make("coreml", recipe("int8")), self.RULE, GPU) == []


class TestWidthOfStates:
    RULE = "coreml-ane-state-width"

    @pytest.mark.parametrize(("width", "count"), [(64, 0), (48, 2)])
    def test_a_state_is_measured(self, make, copy, width, count):
        bundle = copy(make("coreml", recipe("fp16")))

        def change(program):
            for function in program.mlProgram.functions.values():
                for value in function.inputs:
                    if value.type.WhichOneof("type") == "stateType":
                        axes = value.type.stateType.wrappedType.tensorType.dimensions
                        axes[-1].constant.size = width

        edit_program(bundle, "decoder", change)
        findings = found(bundle, self.RULE, NEURAL)
        assert len(findings) == count
        assert {finding.severity for finding in findings} <= {"error"}
        assert not applies(bundle, self.RULE, GPU)


class TestOldestSystem:
    RULE = "coreml-ios-version"

    def test_states_and_integers_need_ios_18(self, make):
        bundle = make("coreml", integers())
        (finding,) = [f for f in found(bundle, self.RULE, Platform(ios=(17,))) if f.where == DECODER]
        assert finding.severity == "error"
        for need in ("states", "4-bit integers", "scales per block"):
            assert need in finding.message
        assert found(bundle, self.RULE, ON_18) == found(bundle, self.RULE) == []

    def test_a_package_that_claims_an_older_system_is_found(self, make, copy):
        bundle = copy(make("coreml", recipe("fp16")))
        edit_program(bundle, "decoder", lambda program: setattr(program, "specificationVersion", 8))
        (finding,) = found(bundle, self.RULE)
        assert finding.message == ("the package says 8 (iOS 17), but has states, which need iOS 18")

    def test_palettes_per_group_are_as_new(self, make):
        (finding,) = [
            f for f in found(make("coreml", palettes()), self.RULE, Platform(ios=(16,))) if f.where == DECODER
        ]
        assert "palettes per group" in finding.message


def test_rules_about_other_targets_do_not_apply(make):
    bundle = make("onnx", recipe("fp16"))
    assert not applies(bundle, "coreml-fused-attention", ON_26)
