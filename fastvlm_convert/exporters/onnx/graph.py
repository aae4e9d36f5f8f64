"""Build an ONNX graph by hand: names and shapes in memory, weights straight into the data file.

A graph is plain data: `proto` makes onnx's message of it, `proto_size` tells how long that will be without
onnx.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastvlm_convert.arithmetic import ceil_div, num_elements
from fastvlm_convert.exporters.job import OnBytes
from fastvlm_convert.exporters.onnx.data import DataFile, Region
from fastvlm_convert.io_names import FloatName, TensorSpec

# Pinned: onnx's own defaults move with every release, and bytes must depend on inputs alone.
IR_VERSION = 10
OPSET = 20
PRODUCER = "fastvlm-convert"
MICROSOFT = "com.microsoft"  # ONNX Runtime's fused operators

_INLINE_BYTES = 4096  # smaller tensors stand in the graph itself: a page each would waste more

_TYPES = {  # TensorProto.DataType and the bits of an element
    "float32": (1, 32),
    "float16": (10, 16),
    "int64": (7, 64),
    "int32": (6, 32),
    "int8": (3, 8),
    "uint8": (2, 8),
    "uint16": (4, 16),
    "int4": (22, 4),
    "uint4": (21, 4),
    "bool": (9, 8),
}


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of an array; 4-bit integers are packed two to a byte."""
    return ceil_div(num_elements(shape) * _TYPES[dtype][1], 8)


def tensor_type(name: str) -> int:
    """ONNX's number of a dtype."""
    return _TYPES[name][0]


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        kind: Operator.
        name: Unique name.
        inputs: Values it reads; "" for an optional one that is left out.
        outputs: Values it gives.
        domain: Operator set.
        attributes: Integers, floats, texts and lists of integers.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Constant:
    """An array that is part of the model; ONNX calls it an initializer.

    Attributes:
        name: Unique name.
        dtype: Of its elements.
        shape: Dimensions.
        content: Its bytes where they stand in the graph, or the region of a data file that begins with them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: bytes | Region

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return num_bytes(self.dtype, self.shape)


class Graph:
    """One graph under construction. A value is known by its name.

    Args:
        name: Name of the graph.
        data: Where large weights go.
        storage: Dtype of float weights in the file.
        compute: Dtype they are used in; a Cast stands between where the two differ (runtimes fold it).
        on_bytes: Called with the number of bytes of each weight written.
        accuracy_level: Of products with quantized weights, see `OnnxSettings`.

    Attributes:
        folds_weights: Whether runtimes turn integers of other weights into floats when they load the graph.
    """

    def __init__(
        self,
        name: str,
        data: DataFile,
        storage: FloatName,
        compute: FloatName,
        on_bytes: OnBytes,
        accuracy_level: int = 4,
    ) -> None:
        self.name = name
        self.data = data
        self.storage = storage
        self.compute = compute
        self.on_bytes = on_bytes
        self.accuracy_level = accuracy_level
        self.folds_weights = False
        self.opset = OPSET
        self.nodes: list[Node] = []
        self.constants: dict[str, Constant] = {}
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        self._names: set[str] = set()

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare an input; a symbolic dimension is a string."""
        self.inputs.append(TensorSpec(name, dtype, tuple(shape)))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare an output; a symbolic dimension is a string."""
        self.outputs.append(TensorSpec(name, dtype, tuple(shape)))

    def op(
        self,
        kind: str,
        name: str,
        inputs: Sequence[str],
        *,
        outputs: Sequence[str] | None = None,
        domain: str = "",
        **attributes: Any,  # noqa: ANN401
    ) -> str:
        """Add an operation; returns its first output, which has the name of the operation itself.

        Args:
            kind: Operator.
            name: Unique name.
            inputs: Values it reads; "" for an optional one that is left out.
            outputs: Names of all outputs where there are several.
            domain: Operator set, ONNX's own by default.
            **attributes: Operator attributes.
        """
        if name in self._names:
            raise AssertionError(f"two operations are called '{name}'")
        self._names.add(name)
        outputs = (name,) if outputs is None else tuple(outputs)
        self.nodes.append(Node(kind, name, tuple(inputs), outputs, domain, attributes))
        return outputs[0]

    def fused(self, kind: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:  # noqa: ANN401
        """Add one of ONNX Runtime's own operators."""
        return self.op(kind, name, inputs, domain=MICROSOFT, **attributes)

    def cast(self, x: str, dtype: str, name: str) -> str:
        """The value in another dtype."""
        return self.op("Cast", name, [x], to=tensor_type(dtype))

    def constant(self, name: str, values: np.ndarray) -> str:
        """A small array that is no weight, kept in the graph and in the dtype it has; shared by name."""
        if name not in self.constants:
            values = np.atleast_1d(values)
            self.constants[name] = Constant(name, values.dtype.name, values.shape, values.tobytes())
        return name

    def scalar(self, name: str, value: np.generic) -> str:
        """A number without dimensions that is no weight, under a name of its own."""
        self.constants[name] = Constant(name, value.dtype.name, (), value.tobytes())
        return name

    def weight(self, name: str, dtype: str, shape: Sequence[int], chunks: Iterable[np.ndarray]) -> str:
        """An array in the graph or, if it is large, in the data file.

        Args:
            name: Unique name.
            dtype: Of its elements; a type that numpy may not have.
            shape: Dimensions.
            chunks: Its bytes, made while they are written.
        """
        length = num_bytes(dtype, shape)
        if length >= _INLINE_BYTES:
            return self.external(name, dtype, shape, self.data.append(chunks, length))
        content = self.data.inline(chunks, length)
        self.constants[name] = Constant(name, dtype, tuple(shape), content)
        return name

    def external(self, name: str, dtype: str, shape: Sequence[int], region: Region) -> str:
        """An array whose bytes lie in a data file; it may read less of the region than is there."""
        assert num_bytes(dtype, shape) <= region.length, f"'{name}' is larger than its region"
        self.constants[name] = Constant(name, dtype, tuple(shape), region)
        return name
