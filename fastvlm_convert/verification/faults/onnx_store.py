"""Stored constants of ONNX graphs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from fastvlm_convert.exporters.onnx.data import ALIGNMENT
from fastvlm_convert.io_names import LOGITS, Component
from fastvlm_convert.verification.faults.bundle_copy import Copy
from fastvlm_convert.verification.faults.constants import Change, Constant, rows_of
from fastvlm_convert.verification.faults.fault import NotApplicableError

_PACKED: Final = (22, 21)  # onnx.TensorProto.INT4 and UINT4; onnx itself loads when a fault is planted
_EXTERNAL: Final = 1  # onnx.TensorProto.EXTERNAL
_QUANTIZED_PRODUCT: Final = "MatMulNBits"


@dataclass
class Graph:
    """A graph of a copy, its weights left in their file.

    Attributes:
        copy: The copy.
        file: Its file, relative to the bundle.
        model: The graph.
    """

    copy: Copy
    file: str
    model: Any
    _bits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.model.graph.node:
            if node.op_type == _QUANTIZED_PRODUCT:  # it reads integers as bytes
                bits = next(a.i for a in node.attribute if a.name == "bits")
                self._bits |= dict.fromkeys((node.input[1], *node.input[3:4]), bits)

    def save(self) -> None:
        """Write the graph back."""
        self.copy.owned(self.file).write_bytes(self.model.SerializeToString())

    def bits(self, tensor: Any) -> int:  # noqa: ANN401  a protobuf message
        """Bits of an element."""
        if tensor.data_type in _PACKED:
            return 4
        return self._bits.get(tensor.name, 8 * _dtype(tensor).itemsize)

    def read(self, tensor: Any) -> np.ndarray:  # noqa: ANN401
        """Its elements; bytes by row where they are packed."""
        if tensor.data_location != _EXTERNAL:
            content = np.frombuffer(tensor.raw_data, np.uint8)
        else:
            path, offset, length = self.region(tensor)
            content = np.fromfile(self.copy.path / path, np.uint8, length, offset=offset)
        if self.bits(tensor) < 8:
            return rows_of(content, tuple(tensor.dims))
        return content.view(_dtype(tensor)).reshape(tensor.dims)

    def write(self, tensor: Any, values: np.ndarray) -> None:  # noqa: ANN401
        """Put other elements in the place of a constant's."""
        content = np.ascontiguousarray(values).tobytes()
        if tensor.data_location != _EXTERNAL:
            tensor.raw_data = content
            self.save()
            return
        path, offset, _ = self.region(tensor)
        with self.copy.owned(path).open("r+b") as file:
            file.seek(offset)
            file.write(content)

    def append(self, tensor: Any, values: np.ndarray) -> None:  # noqa: ANN401
        """Store a constant's elements once more, changed, at the end of its file, for this graph alone."""
        content = np.ascontiguousarray(values).tobytes()
        if tensor.data_location != _EXTERNAL:
            tensor.raw_data = content
        else:
            with self.copy.owned(self.region(tensor)[0]).open("ab") as file:
                file.write(bytes(-file.tell() % ALIGNMENT))
                _set(tensor, "offset", file.tell())
                file.write(content)
        self.save()

    def region(self, tensor: Any) -> tuple[str, int, int]:  # noqa: ANN401
        """File relative to the bundle, offset and length of a constant outside the graph."""
        facts = {entry.key: entry.value for entry in tensor.external_data}
        path = Path(self.file).parent / facts["location"]
        return path.as_posix(), int(facts["offset"]), int(facts["length"])


def open_graph(copy: Copy, component: Component) -> Graph:
    """The graph of a component."""
    import onnx

    file = copy.manifest.artifact("onnx", component).files[0]
    return Graph(copy, file, onnx.load(copy.path / file, load_external_data=False))


def constants(copy: Copy, component: Component) -> dict[str, Constant]:
    """See `constants.Store`."""
    graph = open_graph(copy, component)
    return {
        name: Constant(name, graph.bits(tensor), tuple(tensor.dims))
        for name, tensor in _by_name(graph).items()
    }


def edit(copy: Copy, component: Component, name: str, change: Change) -> None:
    """See `constants.Store`."""
    graph = open_graph(copy, component)
    tensor = _by_name(graph)[name]
    graph.write(tensor, change(graph.read(tensor)))


def edit_head(copy: Copy, change: Change) -> None:
    """See `constants.Store`."""
    graph = open_graph(copy, "decoder")
    tensors = {t.name: t for t in graph.model.graph.initializer}
    (output,) = (o.name for o in graph.model.graph.output if o.name == LOGITS)
    makers = {name: node for node in graph.model.graph.node for name in node.output}
    node = makers[output]
    while node.op_type == "Cast":
        node = makers[node.input[0]]
    name = node.input[1]
    while name not in tensors:  # a cast of the stored matrix
        if name not in makers:
            raise NotApplicableError("the head's table is no constant of its product")
        name = makers[name].input[0]
    graph.append(tensors[name], change(graph.read(tensors[name])))


def _by_name(graph: Graph) -> dict[str, Any]:
    """Initializers by the name that all targets share: a convolution's weight is `stem_0` or `stem_0_q`."""
    tensors = (t for t in graph.model.graph.initializer if t.external_data or t.raw_data)
    return {t.name.replace("_weight", ""): t for t in tensors}


def _dtype(tensor: Any) -> np.dtype:  # noqa: ANN401
    if tensor.data_type in _PACKED:
        return np.dtype(np.uint8)
    from onnx import helper

    return np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))


def _set(tensor: Any, key: str, value: int) -> None:  # noqa: ANN401
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = str(value)
