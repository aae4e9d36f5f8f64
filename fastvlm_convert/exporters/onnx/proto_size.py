"""How long the message of a graph is, without onnx: protobuf's wire format of onnx.proto, counted.

Numbers of fields: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto (proto2, so lists of numbers are not
packed). A field is a tag of one byte, two from number 16 on, and a varint, the four bytes of a float, or a
length and so many bytes.
"""

from collections.abc import Iterable
from typing import Any

from fastvlm_convert.exporters.onnx.data import Region
from fastvlm_convert.exporters.onnx.graph import (
    IR_VERSION,
    MICROSOFT,
    PRODUCER,
    Graph,
    Initializer,
    Node,
    tensor_type,
)
from fastvlm_convert.io_names import TensorSpec

_TWO_BYTE_TAG = 1  # bytes that the tag of AttributeProto.type is longer: its number is 20
_FLOAT = 5  # tag and four bytes
_NEGATIVE = 10  # bytes of any negative varint


def graph_bytes(graph: Graph) -> int:
    """Bytes of the file that `proto.write_graph` writes."""
    body = (
        sum(_message(_node(node)) for node in graph.nodes)
        + _text(graph.name)
        + sum(_message(_tensor(tensor)) for tensor in graph.initializers.values())
        + sum(_message(_value(spec)) for spec in (*graph.inputs, *graph.outputs))
    )
    opsets = sum(
        _message(_text(domain) + _number(version)) for domain, version in (("", graph.opset), (MICROSOFT, 1))
    )
    return _number(IR_VERSION) + _text(PRODUCER) + _message(body) + opsets


def _node(node: Node) -> int:
    attributes = sum(_message(_attribute(name, value)) for name, value in node.attributes.items())
    return _texts((*node.inputs, *node.outputs, node.name, node.kind, node.domain)) + attributes


def _attribute(name: str, value: Any) -> int:  # noqa: ANN401
    kind = _number(1) + _TWO_BYTE_TAG
    if isinstance(value, float):
        return _text(name) + _FLOAT + kind
    if isinstance(value, str):
        return _text(name) + _text(value) + kind
    numbers = value if isinstance(value, list) else [value]
    return _text(name) + sum(_number(n) for n in numbers) + kind


def _tensor(tensor: Initializer) -> int:
    head = sum(_number(n) for n in tensor.shape) + _number(tensor_type(tensor.dtype)) + _text(tensor.name)
    content = tensor.content
    if not isinstance(content, Region):
        return head + _message(tensor.num_bytes)
    entries = (("location", content.location), ("offset", content.offset), ("length", tensor.num_bytes))
    return head + sum(_message(_texts((key, str(value)))) for key, value in entries) + _number(1)


def _value(spec: TensorSpec) -> int:
    dims = sum(_message(_text(n) if isinstance(n, str) else _number(n)) for n in spec.shape)
    tensor_type_ = _number(tensor_type(spec.dtype)) + _message(dims)
    return _text(spec.name) + _message(_message(tensor_type_))


def _number(value: int) -> int:
    return 1 + _varint(value)


def _text(value: str) -> int:
    return _message(len(value.encode()))


def _texts(values: Iterable[str]) -> int:
    return sum(_text(value) for value in values)


def _message(length: int) -> int:
    return 1 + _varint(length) + length


def _varint(value: int) -> int:
    return _NEGATIVE if value < 0 else max(1, -(-value.bit_length() // 7))
