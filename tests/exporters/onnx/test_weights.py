"""Integers that become floats when the graph is loaded, and those that become floats for every picture."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from fastvlm_convert.estimate.workload import target_work
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.recipe_settings import QuantizeRule
from tests.bundles import export_bundle, graph_path, recipe
from tests.checkpoints import GOLDEN, LLAVA

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
SCHEMES = {
    "int8": QuantizeRule(("vision.*", "projector.*"), "int8"),
    "int8 with zero points": QuantizeRule(("vision.*", "projector.*"), "int8", symmetric=False),
    "int4 in blocks": QuantizeRule(
        ("vision.*.fc1", "vision.*.fc2", "vision.*.proj"), "int4", block_size=16, symmetric=False
    ),
}


@pytest.fixture(scope="module", params=SCHEMES)
def graphs(request, tmp_path_factory):
    """The vision graphs of one checkpoint and one recipe, by their setting."""
    folder = tmp_path_factory.mktemp("vision_weights")
    bundles = {}
    for way in ("folded", "resident"):
        settings = replace(
            recipe(onnx={"vision_weights": way}),
            quantize=(SCHEMES[request.param], QuantizeRule(("*",), "float")),
        )
        bundles[way] = export_bundle(CHECKPOINT, folder / way, settings)
    return bundles


def encoded(path, pixels):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: pixels})[0]


def operators(path):
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


def test_both_store_the_same_integers_and_encode_alike(graphs):
    paths = {way: graph_path(bundle, "vision") for way, bundle in graphs.items()}
    assert "DequantizeLinear" not in operators(paths["folded"])
    assert "DequantizeLinear" in operators(paths["resident"])
    data = [path.with_name(f"{path.name}_data").read_bytes() for path in paths.values()]
    assert data[0] == data[1]
    size = load_manifest(graphs["folded"]).contract.image_size
    pixels = np.random.default_rng(0).random((1, 3, size, size), np.float32)
    folded, resident = (encoded(path, pixels) for path in paths.values())
    # The weights have the same bits; convolutions in blocks add up in another order.
    np.testing.assert_allclose(folded, resident, rtol=0, atol=2e-6 * np.abs(resident).max())


def test_what_the_runtime_executes_holds_no_integers(graphs, tmp_path):
    """The optimized graph, as ONNX Runtime runs it."""
    operators_run = {}
    for way, bundle in graphs.items():
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{way}.onnx")
        options.log_severity_level = 4
        onnxruntime.InferenceSession(
            graph_path(bundle, "vision"), options, providers=["CPUExecutionProvider"]
        )
        graph = onnx.load(tmp_path / f"{way}.onnx", load_external_data=False).graph
        kinds = {tensor.data_type for tensor in graph.initializer}
        operators_run[way] = kinds & {
            onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.UINT4,
        }  # fmt: skip
    assert not operators_run["folded"]
    assert operators_run["resident"]


def test_the_estimate_counts_the_floats_that_are_made(graphs):
    made = {
        way: target_work(bundle, load_manifest(bundle), "onnx").vision.made_bytes
        for way, bundle in graphs.items()
    }
    session = onnx.load(graph_path(graphs["folded"], "vision"), load_external_data=False)
    integers = sum(
        4 * int(np.prod(t.dims)) for t in session.graph.initializer if t.name.endswith("_weight_q")
    )
    assert made["folded"] >= integers > made["resident"]
