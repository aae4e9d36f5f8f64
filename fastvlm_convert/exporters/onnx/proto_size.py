"""How long the message of a graph is, without onnx: the messages of onnx.proto, counted.

Numbers of fields: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto (proto2, so lists of numbers are not
packed). Only where a number is above 15, so that its tag is longer, it is given here.
"""

from typing import Any

from fastvlm_convert.exporters.onnx.data import Region
from fastvlm_convert.exporters.onnx.graph import (
    IR_VERSION,
    MICROSOFT,
    PRODUCER,
    Constant,
    Graph,
    Node,
    tensor_type,
)
from fastvlm_convert.exporters.protobuf_size import message, number, real, text, texts
from fastvlm_convert.io_names import TensorSpec

_ATTRIBUTE_TYPE = 20


def graph_bytes(graph: Graph) -> int:
    """Bytes of the file that `proto.write_graph` writes."""
    body = (
        sum(message(_node(node)) for node in graph.nodes)
        + text(graph.name)
        + sum(message(_tensor(constant)) for constant in graph.constants.values())
        + sum(message(_value(spec)) for spec in (*graph.inputs, *graph.outputs))
    )
    opsets = sum(
        message(text(domain) + number(version)) for domain, version in (("", graph.opset), (MICROSOFT, 1))
    )
    return number(IR_VERSION) + text(PRODUCER) + message(body) + opsets


def _node(node: Node) -> int:
    attributes = sum(message(_attribute(name, value)) for name, value in node.attributes.items())
    return texts((*node.inputs, *node.outputs, node.name, node.kind, node.domain)) + attributes


def _attribute(name: str, value: Any) -> int:  # noqa: ANN401
    kind = number(1, _ATTRIBUTE_TYPE)
    if isinstance(value, float):
        return text(name) + real() + kind
    if isinstance(value, str):
        return text(name) + text(value) + kind
    numbers = value if isinstance(value, list) else [value]
    return text(name) + sum(number(n) for n in numbers) + kind


def _tensor(constant: Constant) -> int:
    head = sum(number(n) for n in constant.shape) + number(tensor_type(constant.dtype)) + text(constant.name)
    content = constant.content
    if not isinstance(content, Region):
        return head + message(constant.num_bytes)
    entries = (("location", content.location), ("offset", content.offset), ("length", constant.num_bytes))
    return head + sum(message(texts((key, str(value)))) for key, value in entries) + number(1)


def _value(spec: TensorSpec) -> int:
    dims = sum(message(text(n) if isinstance(n, str) else number(n)) for n in spec.shape)
    kind = number(tensor_type(spec.dtype)) + message(dims)
    return text(spec.name) + message(message(kind))
