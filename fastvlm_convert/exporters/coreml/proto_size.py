"""How long the messages of a package are, without coremltools: those of Model.proto and MIL.proto, counted.

https://github.com/apple/coremltools/tree/main/mlmodel/format (proto3: zeros and empty texts are not written,
lists of numbers are packed). Fields are counted as coremltools fills them; their numbers are given where they
are above 15, so that their tags are longer.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np

from fastvlm_convert.exporters.coreml.data import CountedData, is_inline
from fastvlm_convert.exporters.coreml.graph import Constant, Graph, Input, Node, num_bytes
from fastvlm_convert.exporters.coreml.metadata import AUTHOR, Metadata
from fastvlm_convert.exporters.coreml.values import FLEXIBLE, Value, literal
from fastvlm_convert.exporters.protobuf_size import message, number, text, varint

# Model, ModelDescription, Metadata, ArrayFeatureType
_ML_PROGRAM: Final = 502
_FUNCTIONS: Final = 20
_DEFAULT_FUNCTION: Final = 21
_METADATA: Final = 100
_USER_DEFINED: Final = 100
_ENUMERATED_SHAPES: Final = 21
_SHAPE_RANGE: Final = 31

_ARRAY_TYPE: Final = 65568  # of FLOAT32; the numbers of other dtypes are as long
_RGB: Final = 20
_VERSIONS: Final = {"iOS16": 7, "iOS18": 9}
_WEIGHT_FILE: Final = "@model_path/weights/weight.bin"


def package_bytes(graphs: Sequence[Graph], metadata: Metadata) -> tuple[int, int]:
    """Bytes of the program and of the file of weights that `proto.write_package` writes.

    Args:
        graphs: The functions of a package.
        metadata: What stands inside for people.
    """
    weights = _Weights()
    functions = sum(message(text(g.name) + message(_function(g, weights))) for g in graphs)
    program = number(1) + functions
    model = number(_VERSIONS[graphs[0].system]) + message(_description(graphs, metadata))
    return model + message(program, _ML_PROGRAM), weights.data.size


class _Weights:
    """Where the arrays of a package lie, each once for all functions that read it."""

    def __init__(self) -> None:
        self.data = CountedData()
        self._offsets: dict[str, int] = {}

    def offset(self, constant: Constant, graph: Graph) -> int:
        name = constant.name if constant.is_shared else f"{graph.name}/{constant.name}"
        if name not in self._offsets:
            self._offsets[name] = self.data.append(num_bytes(constant.dtype, constant.shape))
        return self._offsets[name]


def _function(graph: Graph, weights: _Weights) -> int:
    opset = f"CoreML{_VERSIONS[graph.system] - 1}"
    operations = sum(message(size) for size in _operations(graph, weights))
    block = operations + sum(text(value.name) for value in graph.outputs)
    inputs = sum(message(_input(given)) for given in graph.inputs)
    return inputs + text(opset) + message(text(opset) + message(block))


def _input(given: Input) -> int:
    kind = _type(given.value.shape)
    return text(given.value.name) + message(message(message(kind)) if given.kind == "state" else kind)


def _operations(graph: Graph, weights: _Weights) -> Iterator[int]:
    """Bytes of every operation, in the order of the file, which decides where arrays lie."""
    constants: dict[str, Constant] = {
        node.name: node.inputs["val"] for node in graph.nodes if node.kind == "const"
    }
    held = [x for node in graph.nodes if _holds_arrays(node) for x in node.inputs.values()]
    inside = {x.name for x in held if isinstance(x, Value)}
    for node in graph.nodes:
        if node.kind == "const":
            if node.name not in inside:
                constant = constants[node.name]
                yield _const(node.name, _value(constant, graph, weights), constant.shape)
        elif _holds_arrays(node):
            yield _decompression(node, constants, graph, weights)
        elif node.kind == "coreml_update_state":
            yield from _state_update(node)
        else:
            yield from _with_literals(node)


def _holds_arrays(node: Node) -> bool:
    """Whether an operation decompresses weights: its arrays are no operations of their own."""
    return node.kind.startswith("constexpr_")


def _with_literals(node: Node) -> Iterator[int]:
    """An operation after the constants that coremltools makes of the literals among its inputs."""
    arguments = dict.fromkeys(node.inputs, 0)
    for key, name, x in _bound(node):
        if not isinstance(x, Value):
            array = literal(x)
            value = message(_type(array.shape)) + message(message(_elements(array)))
            yield _const(name, value, array.shape)
        arguments[key] += _binding(name)
    yield _operation(node.kind, node.name, arguments, node.outputs)


def _bound(node: Node) -> Iterator[tuple[str, str, Any]]:
    """Everything an operation reads: its parameter, its name, and the value or literal itself."""
    for key, x in node.inputs.items():
        if isinstance(x, list) and any(isinstance(part, Value | list) for part in x):
            for i, part in enumerate(x):
                yield key, part.name if isinstance(part, Value) else f"{node.name}_{key}{i}_0", part
        else:
            yield key, x.name if isinstance(x, Value) else f"{node.name}_{key}_0", x


def _operation(kind: str, name: str, inputs: Mapping[str, int], outputs: Sequence[Value]) -> int:
    """An operation with the bytes of its inputs' arguments by parameter."""
    arguments = sum(message(text(key) + message(size)) for key, size in inputs.items())
    results = sum(message(_named_type(value.name, value.shape)) for value in outputs)
    return text(kind) + arguments + results + message(text("name") + message(_text_value(name)))


def _const(name: str, value: int, shape: tuple[int, ...]) -> int:
    attribute = message(text("val") + message(value))
    return _operation("const", name, {}, []) + attribute + message(_named_type(name, shape))


def _decompression(node: Node, constants: Mapping[str, Constant], graph: Graph, weights: _Weights) -> int:
    """An operation that holds its arrays itself: among its inputs, or before iOS 17 among its attributes."""
    if node.kind == "constexpr_cast":
        source = _value(constants[node.inputs["source_val"].name], graph, weights)
        dtype = _text_value(node.inputs["output_dtype"])
        attributes = message(text("source_val") + message(source)) + message(
            text("output_dtype") + message(dtype)
        )
        return _operation(node.kind, node.name, {}, node.outputs) + attributes
    inputs = {
        key: message(message(_value(constants[x.name], graph, weights), 2))
        if x.name in constants
        else _binding(x.name)
        for key, x in node.inputs.items()
    }
    return _operation(node.kind, node.name, inputs, node.outputs)


def _state_update(node: Node) -> Iterator[int]:
    state, value = _binding(node.inputs["state"].name), _binding(node.inputs["value"].name)
    yield _operation("write_state", f"{node.name}_write_state", {"input": state, "data": value}, [])
    yield _operation("read_state", node.name, {"input": state}, node.outputs)


def _binding(name: str) -> int:
    return message(text(name))


def _text_value(content: str) -> int:
    return message(_type(())) + message(message(message(text(content))))


def _value(constant: Constant, graph: Graph, weights: _Weights) -> int:
    kind = message(_type(constant.shape))
    if not is_inline(constant.shape):
        return kind + message(text(_WEIGHT_FILE) + number(weights.offset(constant, graph)))
    if constant.is_shared:  # a weight, which nobody reads
        size = num_bytes(constant.dtype, constant.shape)
        return kind + message(message(message(message(size))))
    return kind + message(message(_elements(constant.load())))


def _elements(array: np.ndarray) -> int:
    """A list of numbers, or one text, as a tensor's value holds it."""
    if array.dtype.kind == "U":
        return message(text(str(array)))
    if array.dtype.kind == "f" or array.dtype.itemsize == 1:
        return message(message(array.nbytes))
    numbers = array.reshape(-1).tolist()
    return message(message(sum(varint(int(n)) for n in numbers)))


def _named_type(name: str, shape: tuple[int, ...]) -> int:
    return text(name) + message(_type(shape))


@lru_cache(1 << 10)
def _type(shape: tuple[int, ...]) -> int:
    """A tensor's type; the number of every dtype has one byte."""
    rank = number(len(shape)) if shape else 0
    dimensions = sum(message(message(0 if n in (0, FLEXIBLE) else number(n))) for n in shape)
    return message(number(1) + rank + dimensions)


def _description(graphs: Sequence[Graph], metadata: Metadata) -> int:
    details = sum(message(text(key) + text(value), _USER_DEFINED) for key, value in metadata.details.items())
    said = text(metadata.description) + text(metadata.version) + text(AUTHOR) + text(metadata.license)
    features = [_features(graph, metadata) for graph in graphs]
    if len(graphs) > 1:
        functions = zip(graphs, features, strict=True)
        features = [message(text(graph.name) + size, _FUNCTIONS) for graph, size in functions]
        features.append(text(graphs[0].name, _DEFAULT_FUNCTION))
    return sum(features) + message(said + details, _METADATA)


def _features(graph: Graph, metadata: Metadata) -> int:
    kinds = {given.value.name: _feature_type(given) for given in graph.inputs}
    kinds |= {value.name: message(_array(value.shape)) for value in graph.outputs}
    said = {name: text(metadata.feature(graph.name, name)) for name in kinds}
    return sum(message(text(name) + said[name] + message(kind)) for name, kind in kinds.items())


def _feature_type(given: Input) -> int:
    shape, lengths = given.value.shape, given.lengths
    if given.kind == "image":
        return message(number(shape[3]) + number(shape[2]) + number(_RGB))
    if given.kind == "state":
        return message(message(_array(shape)))
    if lengths is None:
        return message(_array(shape))
    least, most = (_with_length(shape, n) for n in (lengths.least, lengths.most))
    if lengths.is_range:
        ranges = sum(message(number(a) + number(b)) for a, b in zip(least, most, strict=True))
        return message(_array(least) + message(ranges, _SHAPE_RANGE))
    shapes = sum(message(_packed(each)) for each in (least, most))
    return message(_array(least) + message(shapes, _ENUMERATED_SHAPES))


def _with_length(shape: Sequence[int], length: int) -> list[int]:
    return [length if n == FLEXIBLE else n for n in shape]


def _array(shape: Sequence[int]) -> int:
    return number(_ARRAY_TYPE) + (0 if FLEXIBLE in shape else _packed(shape))


def _packed(numbers: Sequence[int]) -> int:
    return message(sum(varint(n) for n in numbers))
