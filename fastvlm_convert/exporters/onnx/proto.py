"""Write a graph as onnx's message."""

from pathlib import Path

from onnx import TensorProto, ValueInfoProto, helper

from fastvlm_convert.exporters.onnx.data import Region
from fastvlm_convert.exporters.onnx.graph import (
    IR_VERSION,
    MICROSOFT,
    PRODUCER,
    Constant,
    Graph,
    tensor_type,
)
from fastvlm_convert.io_names import TensorSpec


def write_graph(graph: Graph, path: Path) -> None:
    """Write a graph; its data file is complete once that is closed."""
    nodes = [
        helper.make_node(n.kind, n.inputs, n.outputs, name=n.name, domain=n.domain, **n.attributes)
        for n in graph.nodes
    ]
    inputs, outputs = ([_value(spec) for spec in specs] for specs in (graph.inputs, graph.outputs))
    initializers = [_tensor(constant) for constant in graph.constants.values()]
    model = helper.make_model(
        helper.make_graph(nodes, graph.name, inputs, outputs, initializers),
        opset_imports=[helper.make_opsetid("", graph.opset), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=IR_VERSION,
        producer_name=PRODUCER,
    )
    path.write_bytes(model.SerializeToString(deterministic=True))


def _value(spec: TensorSpec) -> ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, tensor_type(spec.dtype), spec.shape)


def _tensor(constant: Constant) -> TensorProto:
    tensor = TensorProto(name=constant.name, data_type=tensor_type(constant.dtype), dims=constant.shape)
    content, length = constant.content, constant.num_bytes
    if isinstance(content, Region):
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", content.location), ("offset", content.offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    else:
        tensor.raw_data = content
    return tensor
