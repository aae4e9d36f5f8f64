"""Rules about what is in a bundle, whichever format it has."""

import os
from dataclasses import replace

import numpy as np
import onnx
import pytest

from fastvlm_convert.lint.platform import Platform
from tests.bundles import edit_manifest, recipe
from tests.lint.conftest import applies, edit_graph, found, integers, resized


class TestFloat32Left:
    RULE = "float32-in-float16"

    def test_a_weight_in_an_onnx_file_is_found(self, make, copy):
        bundle = copy(make("onnx", recipe("fp16")))

        def plant(model):
            weight = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
            model.graph.initializer.remove(weight)
            left = np.zeros(list(weight.dims), np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(left, weight.name))

        assert found(bundle, self.RULE) == []
        edit_graph(bundle, "decoder", plant)
        (finding,) = found(bundle, self.RULE)
        assert finding.where.startswith("onnx/decoder")
        assert finding.severity == "warning"

    def test_a_core_ml_package_is_looked_into(self, make, copy):
        bundle = copy(make("coreml", recipe("fp32")))
        assert found(bundle, self.RULE) == []

        def claim(manifest):
            for artifact in manifest["artifacts"]:
                artifact["storage"] = "float16"

        edit_manifest(bundle, claim)
        assert {finding.where for finding in found(bundle, self.RULE)} == {
            "coreml/vision.mlpackage", "coreml/decoder.mlpackage",
        }  # fmt: skip

    @pytest.mark.parametrize("target", ["onnx", "coreml"])
    def test_angles_and_scales_of_float32_arithmetic_are_none(self, make, target):
        settings = integers(decoder={"compute": "float32"}, vision={"compute": "float32"})
        assert found(make(target, settings), self.RULE) == []


class TestDuplicates:
    RULE = "duplicated-tensor"

    def test_a_table_beside_its_head_is_found(self, make):
        apart = make("onnx", recipe("fp32", onnx={"shared_table": False}))
        (finding,) = found(apart, self.RULE)
        assert "embed_tokens_weight and lm_head_weight" in finding.message
        assert finding.where.count("onnx_data") == 2
        assert found(make("onnx", recipe("fp32")), self.RULE) == []
        assert not applies(apart, self.RULE, Platform(provider="webgpu"))

    def test_a_copy_inside_a_graph_is_found(self, make, copy):
        bundle = copy(make("onnx", recipe("fp32")))
        values = np.arange(8192, dtype=np.float32)
        twins = [onnx.numpy_helper.from_array(values, name) for name in ("one", "two")]
        edit_graph(bundle, "vision", lambda model: model.graph.initializer.extend(twins))
        (finding,) = found(bundle, self.RULE)
        assert finding.message == "onnx: one and two hold the same 32,768 bytes, stored 2 times"

    def test_functions_of_a_package_share_their_weights(self, make):
        """And have each their own numbers of positions, which are no weights."""
        longer = recipe("fp16", common={"max_context_length": 4096})
        assert found(make("coreml", longer), self.RULE) == []


def test_a_file_above_a_stores_limit_is_found(make, copy):
    bundle = copy(make("onnx", recipe("fp16")))
    path = next((bundle / "onnx").glob("vision*_data"))
    assert found(bundle, "store-limit") == []
    os.truncate(path, 1_600_000_000)  # sparse: it takes no room
    resized(bundle, f"onnx/{path.name}")
    (finding,) = found(bundle, "store-limit")
    assert finding.message.startswith("Play for On-device AI: the pack with onnx/")


def test_a_context_beyond_the_models_positions_is_found(make):
    rule = "context-beyond-training"
    longer = make("onnx", replace(recipe("fp16", common={"max_context_length": 4096})))
    (finding,) = found(longer, rule)
    assert finding.message == "the context of 4096 tokens is longer than the 2048 the model was trained for"
    assert found(make("onnx", recipe("fp16")), rule) == []
