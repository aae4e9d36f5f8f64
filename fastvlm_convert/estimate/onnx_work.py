"""The work of an ONNX graph, by walking it with shapes; weights stay on disk."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fastvlm_convert.errors import BundleError, shortened
from fastvlm_convert.estimate.onnx_shapes import BITS, RULES, VIEWS, Result, Value
from fastvlm_convert.estimate.work import Work, most_alive
from fastvlm_convert.regular_file import read_file

_MAX_GRAPH_BYTES: Final = 64 << 20  # weights lie beside a graph; ours take a few hundred kilobytes
_EXECUTED: Final = "DequantizeLinear"  # which ONNX Runtime does for every call, even of a weight
_MAX_NUMBERS: Final = 64  # of a shape, or of indices
_HINT: Final = "`fastvlm-convert bundle check` tells whether the file was changed; or export the bundle again"
# What indexing, unpacking and looking up attributes raise where a graph contradicts itself.
_CONTRADICTIONS: Final = (ValueError, LookupError, TypeError, ZeroDivisionError)


def onnx_work(path: Path, dimensions: Mapping[str, int], given: Mapping[str, Sequence[int]]) -> Work:
    """What a call of a graph does.

    Args:
        path: The graph.
        dimensions: What its symbolic dimensions are.
        given: Shapes of values in the middle that count as inputs: what makes them does not count.

    Raises:
        BundleError: It is no graph, contradicts itself, or has an operation that is not known here.
    """
    graph = _read(path)
    walk = _Walk(path)
    walk.declare(graph, dimensions)
    for name, shape in given.items():
        walk.take(name, Value(tuple(shape), 32))
    for node in _needed(graph, given):
        walk.step(node)
    return walk.work()


def _needed(graph: Any, given: Iterable[str]) -> list[Any]:  # noqa: ANN401
    """The operations that the outputs depend on, in order, without those that only make given values."""
    wanted = {output.name for output in graph.output} - {*given}
    nodes = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            nodes.append(node)
            wanted |= {*node.input} - {*given}
    return nodes[::-1]


def _read(path: Path) -> Any:  # noqa: ANN401  a protobuf message
    try:
        return onnx.ModelProto.FromString(read_file(path, _MAX_GRAPH_BYTES)).graph
    except OSError as error:
        raise BundleError(f"cannot read the graph: {error.strerror or error}", where=path) from error
    except DecodeError as error:
        raise BundleError("the graph is no valid protobuf", where=path, hint=_HINT) from error


class _Walk:
    """Follows shapes through a graph and adds up what its operations do."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, Value] = {}
        self._given: dict[str, int] = {}  # bytes of inputs
        self._stored: dict[str, tuple[object, int]] = {}  # where a weight lies, and its bytes
        self._roots: dict[str, str] = {}  # of another shape of the same bytes, what it is a view of
        self._whole: set[str] = set()
        self._made: dict[
            str, tuple[str, int]
        ] = {}  # of a weight made when loading: its first name, its bytes
        self._used: dict[str, int] = {}  # bytes of those that operations read
        self._rows: dict[str, int] = {}  # bytes of the rows that are looked up, by table
        self._macs = 0
        self._cache_bytes = 0
        self._writes: list[tuple[str, int, tuple[str, ...]]] = []

    def declare(self, graph: Any, dimensions: Mapping[str, int]) -> None:  # noqa: ANN401
        """Take the weights and the inputs."""
        for tensor in graph.initializer:
            if tensor.data_type not in BITS:
                raise self._error(f"'{shortened(tensor.name, 80)}' has the unknown type {tensor.data_type}")
            shape = tuple(tensor.dims)
            value = Value(shape, BITS[tensor.data_type], _integers(tensor), frozenset({tensor.name}))
            self._values[tensor.name] = value
            facts = {entry.key: entry.value for entry in tensor.external_data}
            place = (facts["location"], facts.get("offset")) if "location" in facts else tensor.name
            self._stored[tensor.name] = (place, value.num_bytes)
        for given in graph.input:
            tensor = given.type.tensor_type
            try:
                shape = tuple(d.dim_value or dimensions[d.dim_param] for d in tensor.shape.dim)
            except KeyError as error:
                what = f"input '{shortened(given.name, 80)}' has the unknown dimension {error}"
                raise self._error(what) from error
            self.take(given.name, Value(shape, BITS.get(tensor.elem_type, 32)))

    def take(self, name: str, value: Value) -> None:
        """Take a value that stands before the first operation."""
        self._values[name] = value
        self._given[name] = value.num_bytes

    def step(self, node: Any) -> None:  # noqa: ANN401
        """Take an operation."""
        rule = RULES.get(node.op_type)
        if rule is None:
            raise self._error(
                f"operation '{shortened(node.name, 80)}' is a {shortened(node.op_type, 80)}, "
                "which the estimate does not know"
            )
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        try:
            inputs = [self._values[name] if name else None for name in node.input]
            result = rule(attributes, inputs)
        except _CONTRADICTIONS as error:
            what = f"operation '{shortened(node.name, 80)}' does not fit its inputs"
            raise self._error(f"{what}: {shortened(str(error), 120)}") from error
        if inputs and all(value is None or value.weights for value in inputs):
            self._of_weights(node, result)
        else:
            self._computed(node, result)

    def _of_weights(self, node: Any, result: Result) -> None:  # noqa: ANN401
        """A weight in another form, which runtimes make once, when they load the graph."""
        sources = frozenset().union(*(self._values[name].weights for name in node.input if name))
        for name, value in zip(node.output, result.values, strict=False):
            if name and value is not None:
                self._values[name] = Value(value.shape, value.bits, value.numbers, sources)
                if node.op_type in VIEWS:
                    if node.input[0] in self._made:
                        self._made[name] = self._made[node.input[0]]
                elif node.op_type != _EXECUTED:
                    self._made[name] = (name, value.num_bytes)

    def _computed(self, node: Any, result: Result) -> None:  # noqa: ANN401
        self._macs += result.macs
        self._cache_bytes += result.cache_bytes
        rows = {place: (count, of) for place, count, of in result.looked_up}
        for place, name in enumerate(node.input):
            sources = self._values[name].weights if name else frozenset()
            if place in rows:
                count, of = rows[place]
                for source in sources:  # layers look the same rows up
                    size = self._stored[source][1] * count // of
                    self._rows[source] = max(size, self._rows.get(source, 0))
            else:
                self._whole |= sources
            if name in self._made:
                self._used |= [self._made[name]]
        reads = tuple(self._roots.get(name, name) for name in node.input if name)
        for name, value in zip(node.output, result.values, strict=False):
            if not name or value is None:
                continue
            self._values[name] = value
            if node.op_type in VIEWS:
                self._roots[name] = reads[0]
            else:
                self._writes.append((name, value.num_bytes, reads))

    def work(self) -> Work:
        """What all operations so far do together."""
        weights = dict(self._stored[name] for name in self._whole)  # a table under two names is read once
        read = {name for _, _, reads in self._writes for name in reads}
        kept = {name: size for name, size in self._given.items() if name in read and not _is_cache(name)}
        return Work(
            self._macs,
            sum(weights.values()),
            sum(self._rows.values()),
            self._cache_bytes,
            sum(size for _, size, _ in self._writes),
            most_alive(self._writes, kept),
            sum(self._used.values()),
        )

    def _error(self, problem: str) -> BundleError:
        return BundleError(problem, where=self._path, hint=_HINT)


def _is_cache(name: str) -> bool:
    return name.startswith("past_key_values.")


def _integers(tensor: Any) -> tuple[int, ...] | None:  # noqa: ANN401
    """The numbers of a small int64 array in the graph, which may be a shape or an axis."""
    size = len(tensor.raw_data)
    if tensor.data_type != onnx.TensorProto.INT64 or not 0 < size <= 8 * _MAX_NUMBERS or size % 8:
        return None
    raw = tensor.raw_data
    return tuple(int.from_bytes(raw[i : i + 8], "little", signed=True) for i in range(0, size, 8))
