import numpy as np
import pytest

from fastvlm_convert.exporters.onnx.data import CountedData
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.proto import write_graph
from fastvlm_convert.exporters.onnx.proto_size import graph_bytes

NAMES = (
    "x",
    "x" * 127,
    "x" * 128,
    "\u00e4" * 70,
)  # lengths of one and of two bytes, and more bytes than letters


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"axis": -1},
        {"axis": 0, "keepdims": 127, "to": 128, "K": 1 << 40},
        {"epsilon": 1e-5, "alpha": 1.0},
        {"mode": "linear"},
        {"pads": [0, 3, 200, -1], "perm": [0]},
    ],
)
def test_a_graph_is_as_long_as_onnx_writes_it(tmp_path, name, attributes):
    graph = Graph(name, CountedData(name), "float32", "float32", lambda count: None)
    graph.input("in", "float16", ["batch_size", 3, 1 << 20])
    graph.output(name, "int64", [])
    graph.constant("c", np.arange(100))
    graph.external("w", "int4", (3, 4000), graph.data.append([], 6000))
    graph.op("Kind", name, ["in", "", "w"], domain="com.microsoft", outputs=[name, "", "z"], **attributes)
    write_graph(graph, tmp_path / "g.onnx")
    assert graph_bytes(graph) == (tmp_path / "g.onnx").stat().st_size
