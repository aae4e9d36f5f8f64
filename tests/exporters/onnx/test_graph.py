import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from fastvlm_convert.errors import CheckpointError, RecipeError
from fastvlm_convert.exporters.onnx.data import ExternalData
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.proto import write_graph
from fastvlm_convert.exporters.onnx.proto_size import graph_bytes
from fastvlm_convert.exporters.onnx.weights import floats
from fastvlm_convert.weights.source import Weight, computed


def weight(values: np.ndarray) -> Weight:
    return computed(values.shape, "float32", lambda: values)


@pytest.fixture
def data(tmp_path):
    with ExternalData(tmp_path / "g.onnx_data") as opened:
        yield opened


def graph_of(data: ExternalData, storage="float32", compute="float32") -> Graph:
    return Graph("test", data, storage, compute, lambda count: None)


def saved(graph: Graph, folder) -> onnx.ModelProto:
    write_graph(graph, folder / "g.onnx")
    assert graph_bytes(graph) == (folder / "g.onnx").stat().st_size
    return onnx.load(folder / "g.onnx", load_external_data=False)


def test_versions_are_pinned(data, tmp_path):
    model = saved(graph_of(data), tmp_path)
    assert model.ir_version == 10
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 20), ("com.microsoft", 1)}


def test_small_weights_stand_in_the_graph_and_large_ones_beside_it(tmp_path):
    small, large = np.ones((31, 32), np.float32), np.full((33, 32), 2, np.float32)
    with ExternalData(tmp_path / "g.onnx_data") as data:
        graph = graph_of(data)
        floats(graph, "small", [weight(small)])
        floats(graph, "large", [weight(large)])
    inside, outside = saved(graph, tmp_path).graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(inside), small)
    assert outside.data_location == TensorProto.EXTERNAL
    np.testing.assert_array_equal(numpy_helper.to_array(outside, str(tmp_path)), large)


def test_several_weights_are_stacked(data, tmp_path):
    graph = graph_of(data)
    parts = [np.full((2, 3), n, np.float32) for n in range(3)]
    floats(graph, "qkv", [weight(part) for part in parts])
    (stacked,) = saved(graph, tmp_path).graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(stacked), np.concatenate(parts))


@pytest.mark.parametrize(
    ("storage", "compute", "casts"),
    [("float32", "float32", 0), ("float16", "float16", 0), ("float16", "float32", 1)],
)
def test_a_cast_stands_only_between_two_dtypes(data, tmp_path, storage, compute, casts):
    graph = graph_of(data, storage, compute)
    used = floats(graph, "w", [weight(np.array([1.0, 0.1], np.float32))])
    model = saved(graph, tmp_path)
    assert [node.op_type for node in model.graph.node] == ["Cast"] * casts
    assert used == ("w_float32" if casts else "w")
    (stored,) = model.graph.initializer
    expected = np.array([1.0, 0.1], storage)
    np.testing.assert_array_equal(numpy_helper.to_array(stored), expected)


def test_a_weight_beyond_float16_is_refused_by_name(data):
    graph = graph_of(data, "float16", "float32")
    with pytest.raises(RecipeError, match=r"weight 'l3_gate_weight' reaches 7e\+04, beyond float16's 65504"):
        floats(graph, "l3_gate_weight", [weight(np.array([1, -70000], np.float32))])


def test_an_infinity_is_refused_in_float32_too(data):
    with pytest.raises(CheckpointError, match="'w' holds 1 values that are NaN or infinite"):
        floats(graph_of(data), "w", [weight(np.array([1, np.inf], np.float32))])


def test_the_largest_float16_is_accepted(data):
    floats(graph_of(data, "float16", "float16"), "w", [weight(np.array([65504, -65504], np.float32))])


def test_op_names_are_unique(data):
    graph = graph_of(data)
    graph.op("Relu", "same", ["x"])
    with pytest.raises(AssertionError, match="two operations are called 'same'"):
        graph.op("Relu", "same", ["x"])


def test_a_tensor_cannot_read_beyond_its_region(data):
    graph = graph_of(data)
    region = data.append([np.zeros(4, np.float32)], 16)
    graph.external("fits", "float32", (2, 2), region)
    with pytest.raises(AssertionError, match="larger than its region"):
        graph.external("too_large", "float32", (5,), region)


def test_written_weights_are_counted_in_checkpoint_bytes(data):
    counted: list[int] = []
    graph = Graph("test", data, "float16", "float16", counted.append)
    floats(graph, "w", [weight(np.zeros((4, 8), np.float32))])
    assert sum(counted) == 4 * 8 * 4
