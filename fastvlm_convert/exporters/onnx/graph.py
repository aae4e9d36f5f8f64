"""Build an ONNX graph by hand: names and shapes in memory, weights straight into the data file.

A graph is plain data: `proto` makes onnx's message of it, `wire` tells how long that will be without onnx.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastvlm_convert.errors import TargetError
from fastvlm_convert.exporters.onnx.data import DataFile, Region
from fastvlm_convert.io_names import FloatName, TensorSpec
from fastvlm_convert.weights.source import Weight

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
    "int4": (22, 4),
    "uint4": (21, 4),
}

OnBytes = Callable[[int], None]


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; 4-bit integers lie two in a byte."""
    return -(-int(np.prod(shape, dtype=np.int64)) * _TYPES[dtype][1] // 8)


def tensor_type(name: str) -> int:
    """ONNX's number of a dtype."""
    return _TYPES[name][0]


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        kind: Operator.
        inputs: Values it reads; "" for an optional one left out.
        outputs: Values it gives.
        name: Unique name.
        domain: Operator set.
        attributes: Integers, floats, texts and lists of integers.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str
    domain: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Initializer:
    """A constant.

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
    """One graph under construction.

    Args:
        name: Name of the graph.
        data: Where large weights go.
        storage: Dtype of float weights in the file.
        compute: Dtype they are used in; a Cast stands between where the two differ (runtimes fold it).
        on_bytes: Called with the number of bytes of each weight written.
        accuracy_level: Of products with quantized weights, see `OnnxSettings`.
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
        self.accuracy_level = accuracy_level
        self.opset = OPSET
        self._on_bytes = on_bytes
        self.nodes: list[Node] = []
        self.initializers: dict[str, Initializer] = {}
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        self._names: set[str] = set()

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare a graph input."""
        self.inputs.append(TensorSpec(name, dtype, tuple(shape)))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare a graph output."""
        self.outputs.append(TensorSpec(name, dtype, tuple(shape)))

    def op(
        self,
        kind: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] | None = None,
        domain: str = "",
        **attributes: Any,  # noqa: ANN401
    ) -> str:
        """Add an operation; returns its first output, which is called like the operation itself.

        Args:
            kind: Operator.
            inputs: Values it reads; "" for an optional one left out.
            name: Unique name.
            outputs: Names of all outputs where there are several.
            domain: Operator set, ONNX's own by default.
            **attributes: Operator attributes.
        """
        if name in self._names:
            raise AssertionError(f"two operations are called '{name}'")
        self._names.add(name)
        outputs = (name,) if outputs is None else tuple(outputs)
        self.nodes.append(Node(kind, tuple(inputs), outputs, name, domain, attributes))
        return outputs[0]

    def fused(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:  # noqa: ANN401
        """Add one of ONNX Runtime's own operators."""
        return self.op(kind, inputs, name, domain=MICROSOFT, **attributes)

    def constant(self, name: str, values: np.ndarray) -> str:
        """A small tensor that stands in the graph, kept in the dtype it has."""
        if name not in self.initializers:
            values = np.atleast_1d(values)
            self.initializers[name] = Initializer(name, values.dtype.name, values.shape, values.tobytes())
        return name

    def cast(self, value: str, dtype: str, name: str) -> str:
        """The value in another dtype."""
        return self.op("Cast", [value], name, to=tensor_type(dtype))

    def weight(self, name: str, *weights: Weight) -> str:
        """A float weight in the compute dtype.

        Args:
            name: Unique name.
            *weights: The weight, or several that are stacked along their first axis.
        """
        shape = (sum(w.shape[0] for w in weights), *weights[0].shape[1:])
        stored = self.stored(name, (chunk for w in weights for chunk in w.chunks()))
        self.tensor(name, stored, self.storage, shape)
        return (
            name if self.storage == self.compute else self.cast(name, self.compute, f"{name}_{self.compute}")
        )

    def external(self, name: str, region: Region, dtype: str, shape: Sequence[int]) -> str:
        """A tensor whose bytes lie in a data file; it may read less of the region than is there."""
        assert num_bytes(dtype, shape) <= region.length, f"'{name}' is larger than its region"
        self.initializers[name] = Initializer(name, dtype, tuple(shape), region)
        return name

    def stored(self, name: str, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Chunks of float32 in the storage dtype.

        Raises:
            TargetError: A value is beyond float16's range.
        """
        for chunk in chunks:
            if self.storage == "float16":
                with np.errstate(over="ignore"):
                    half = chunk.astype(np.float16)
                if not np.isfinite(half).all():
                    raise TargetError(
                        f"weight '{name}' reaches {float(np.abs(chunk).max()):.4g}, beyond float16's 65504",
                        hint="store that component as float32 in the recipe; for a bias of keys, "
                        "`scan -o FILE` writes a recipe that repairs it",
                    )
                yield half
            else:
                yield chunk
            self.count(4 * chunk.size)

    def count(self, num_bytes: int) -> None:
        """Report bytes of weights as written, counted as float32."""
        self._on_bytes(num_bytes)

    def tensor(self, name: str, chunks: Iterable[np.ndarray], dtype: str, shape: Sequence[int]) -> str:
        """A constant in the graph or, if it is large, in the data file.

        Args:
            name: Unique name.
            chunks: Its bytes, made while they are written.
            dtype: Of its elements; a type that numpy may not have.
            shape: Dimensions.
        """
        length = num_bytes(dtype, shape)
        if length >= _INLINE_BYTES:
            return self.external(name, self.data.append(chunks, length), dtype, shape)
        content = self.data.inline(chunks, length)
        self.initializers[name] = Initializer(name, dtype, tuple(shape), content)
        return name
