"""Each rule about ONNX: a bundle that breaks it, one that does not, and where it applies."""

import onnx
import pytest

from fastvlm_convert.lint.platform import Platform
from fastvlm_convert.lint.providers import RUN_ON_CPU
from fastvlm_convert.lint.run import read_facts
from fastvlm_convert.verification.bundle import VerifyResult
from fastvlm_convert.verification.check import at_most
from fastvlm_convert.verification.compare import END_TO_END
from fastvlm_convert.verification.record import write_record
from tests.bundles import recipe
from tests.lint.conftest import applies, edit_graph, found, integers


def with_runtime(*version):
    return Platform(onnxruntime=version)


class TestRuntimeVersion:
    RULE = "onnx-runtime-version"

    @pytest.mark.parametrize(("version", "count"), [((1, 17), 5), ((1, 21, 1), 1), ((1, 22), 0)])
    def test_eight_bits_need_1_22_and_the_format_1_18(self, make, version, count):
        findings = found(make("onnx", integers("int8", 32)), self.RULE, with_runtime(*version))
        assert len(findings) == count
        assert {finding.severity for finding in findings} <= {"error"}

    def test_floats_need_1_18(self, make):
        assert found(make("onnx", recipe("fp16")), self.RULE, with_runtime(1, 18)) == []
        assert not applies(make("onnx", recipe("fp16")), self.RULE, Platform())


class TestUnknownOperators:
    RULE = "onnx-unknown-operator"

    @pytest.mark.parametrize(("domain", "name"), [("com.example", "Magic"), ("", "Magic")])
    def test_an_operator_that_nobody_has_is_found(self, make, copy, domain, name):
        bundle = copy(make("onnx", recipe("fp16")))
        node = onnx.helper.make_node(name, ["pixel_values"], ["nowhere"], domain=domain)
        edit_graph(bundle, "vision", lambda model: model.graph.node.append(node))
        (finding,) = found(bundle, self.RULE)
        assert finding.severity == "error"
        assert f"{domain or 'ai.onnx'}:{name}" in finding.message

    def test_operators_of_others_are_asked_for(self, make, copy):
        """Of ONNX Runtime itself: it has kernels for these, but our exporters do not write them."""
        bundle = copy(make("onnx", recipe("fp16")))
        nodes = [onnx.helper.make_node(op, ["pixel_values"], [op]) for op in ("Softmax", "HardSwish")]
        edit_graph(bundle, "vision", lambda model: model.graph.node.extend(nodes))
        assert found(bundle, self.RULE) == []

    @pytest.mark.parametrize("settings", ["fp16", "integers"])
    def test_what_we_write_needs_no_question(self, make, settings):
        bundle = make("onnx", integers() if settings == "integers" else recipe("fp16"))
        written = {node.full_op for graph in read_facts(bundle).graphs for node in graph.nodes}
        assert written <= RUN_ON_CPU
        assert found(bundle, self.RULE) == []


class TestKernelsOfProviders:
    RULE = "onnx-provider-kernels"

    @pytest.mark.parametrize("provider", ["xnnpack", "nnapi", "coreml"])
    def test_the_decoders_fused_operators_are_missing(self, make, provider):
        findings = found(make("onnx", integers()), self.RULE, Platform(provider=provider))
        decoder = next(f for f in findings if f.where and "decoder" in f.where)
        assert decoder.severity == "warning"
        assert "of 69 nodes" in decoder.message or "nodes" in decoder.message
        assert "MatMulNBits" in decoder.message

    def test_the_cpu_lacks_nothing(self, make):
        assert not applies(make("onnx", integers()), self.RULE, Platform(provider="cpu"))
        assert not applies(make("onnx", integers()), self.RULE, Platform())

    def test_browsers_lack_one(self, make, copy):
        bundle, browser = copy(make("onnx", integers())), Platform(provider="webgpu")
        assert found(bundle, self.RULE, browser) == []
        node = onnx.helper.make_node("GatherBlockQuantized", ["input_ids"], ["x"], domain="com.microsoft")
        edit_graph(bundle, "embed", lambda model: model.graph.node.append(node))
        assert len(found(bundle, self.RULE, browser)) == 1


class TestFloat16Products:
    RULE = "onnx-float16-matmulnbits"

    def test_they_are_slow_before_the_fix(self, make):
        bundle = make("onnx", integers(decoder={"compute": "float16"}))
        for platform in (Platform(), with_runtime(1, 22), with_runtime(1, 24, 3)):
            assert len(found(bundle, self.RULE, platform)) == 1
        assert not applies(bundle, self.RULE, with_runtime(1, 25))
        assert not applies(bundle, self.RULE, Platform(provider="webgpu"))

    def test_float32_is_fast(self, make):
        bundle = make("onnx", integers(decoder={"compute": "float32"}))
        assert found(bundle, self.RULE, with_runtime(1, 22)) == []


class TestInt8Activations:
    RULE = "onnx-int8-activations"

    def test_they_are_found_in_the_graph(self, make):
        (finding,) = found(make("onnx", integers()), self.RULE)
        assert finding.severity == "warning"
        assert "nothing is recorded" in finding.message
        assert found(make("onnx", integers(onnx={"accuracy_level": 0})), self.RULE) == []

    @pytest.mark.parametrize(("kl", "count"), [(0.001, 0), (0.5, 1)])
    def test_a_record_of_verify_decides(self, make, copy, kl, count):
        bundle = copy(make("onnx", integers()))
        check = at_most("onnx", END_TO_END, "kl_mean_nats", kl, 0.01, "onnxruntime")
        write_record(bundle, VerifyResult((check,), (), (), 16, "0" * 64))
        findings = found(bundle, self.RULE)
        assert len(findings) == count
        assert all("changes the answers" in finding.message for finding in findings)


@pytest.mark.parametrize(
    ("android", "text"), [((15,), "deprecated"), (None, "deprecated"), ((8,), "no NNAPI"), ((14,), None)]
)
def test_nnapi_has_its_time(make, android, text):
    bundle = make("onnx", recipe("fp16"))
    findings = found(bundle, "onnx-nnapi", Platform(android=android, provider="nnapi"))
    assert [text in finding.message for finding in findings] == ([] if text is None else [True])
    assert not applies(bundle, "onnx-nnapi", Platform(android=android))
