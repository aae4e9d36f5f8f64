"""Build an ONNX graph by hand: names and shapes in memory, weights straight into the data file."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fastvlm_convert.contract import FloatName, TensorSpec
from fastvlm_convert.errors import TargetError
from fastvlm_convert.export.onnx.data import ExternalData, Region
from fastvlm_convert.weights.source import Weight

# Pinned: onnx's own defaults move with every release, and bytes must depend on inputs alone.
IR_VERSION = 10
OPSET = 20
MICROSOFT = "com.microsoft"  # ONNX Runtime's fused operators

_INLINE_BYTES = 4096  # smaller tensors stand in the graph itself: a page each would waste more

_TYPES = {  # ONNX's number and the bits of an element
    "float32": (TensorProto.FLOAT, 32),
    "float16": (TensorProto.FLOAT16, 16),
    "int64": (TensorProto.INT64, 64),
    "int32": (TensorProto.INT32, 32),
    "int8": (TensorProto.INT8, 8),
    "uint8": (TensorProto.UINT8, 8),
    "int4": (TensorProto.INT4, 4),
    "uint4": (TensorProto.UINT4, 4),
}

OnBytes = Callable[[int], None]


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; 4-bit integers lie two in a byte."""
    return -(-int(np.prod(shape, dtype=np.int64)) * _TYPES[dtype][1] // 8)


def tensor_type(name: str) -> int:
    """ONNX's number of a dtype."""
    return int(_TYPES[name][0])


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
        data: ExternalData,
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
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
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
        outputs = [name] if outputs is None else list(outputs)
        self._nodes.append(
            helper.make_node(kind, list(inputs), outputs, name=name, domain=domain, **attributes)
        )
        return outputs[0]

    def fused(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:  # noqa: ANN401
        """Add one of ONNX Runtime's own operators."""
        return self.op(kind, inputs, name, domain=MICROSOFT, **attributes)

    def constant(self, name: str, values: np.ndarray) -> str:
        """A small tensor that stands in the graph, kept in the dtype it has."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
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
        if num_bytes(self.storage, shape) < _INLINE_BYTES:
            self.constant(name, np.concatenate(list(stored)).reshape(shape))
        else:
            self.external(name, self.data.append(stored), self.storage, shape)
        return (
            name if self.storage == self.compute else self.cast(name, self.compute, f"{name}_{self.compute}")
        )

    def external(self, name: str, region: Region, dtype: str, shape: Sequence[int]) -> str:
        """A tensor whose bytes lie in a data file; it may read less of the region than is there."""
        tensor = TensorProto(name=name, data_type=tensor_type(dtype), dims=list(shape))
        tensor.data_location = TensorProto.EXTERNAL
        length = num_bytes(dtype, shape)
        assert length <= region.length, f"'{name}' is larger than its region"
        for key, value in (("location", region.location), ("offset", region.offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
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

    def tensor(self, name: str, content: np.ndarray, dtype: str, shape: Sequence[int]) -> str:
        """Bytes that are ready, as a tensor of a type that numpy may not have."""
        if content.nbytes >= _INLINE_BYTES:
            return self.external(name, self.data.append([content]), dtype, shape)
        tensor = TensorProto(name=name, data_type=tensor_type(dtype), dims=list(shape))
        tensor.raw_data = np.ascontiguousarray(content).tobytes()
        self._initializers[name] = tensor
        return name

    def save(self, path: Path) -> None:
        """Write the graph; its data file is complete once the `ExternalData` is closed."""
        inputs, outputs = (
            [helper.make_tensor_value_info(t.name, tensor_type(t.dtype), t.shape) for t in tensors]
            for tensors in (self.inputs, self.outputs)
        )
        graph = helper.make_graph(self._nodes, self.name, inputs, outputs, list(self._initializers.values()))
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)],
            ir_version=IR_VERSION,
            producer_name="fastvlm-convert",
        )
        path.write_bytes(model.SerializeToString(deterministic=True))
