"""Build a function of an ML program by hand: operations, dtypes and shapes as plain data.

`proto` has coremltools write it, `proto_size` tells how long that will be without coremltools, which takes
seconds to load. Both read the same graphs, so a prediction cannot forget what the exporter writes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

import numpy as np

from fastvlm_convert.arithmetic import ceil_div, num_elements
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.exporters.coreml.values import FLEXIBLE, Value, results
from fastvlm_convert.exporters.job import OnBytes
from fastvlm_convert.io_names import FloatName, TensorSpec
from fastvlm_convert.recipe_settings import FloatSettings
from fastvlm_convert.weights.storage import to_storage

System = Literal["iOS16", "iOS18"]  # the oldest that can run a graph

_FEW = 6  # names that an error message gives as examples
_MIL_NAMES: Final[dict[str, str]] = {"float32": "fp32", "float16": "fp16"}
_BITS: Final[dict[str, int]] = {
    "float32": 32, "float16": 16, "int32": 32, "int8": 8, "uint8": 8, "uint6": 6, "int4": 4, "uint4": 4,
}  # fmt: skip

# coremltools writes every optional input of an operation, at the value it has by default.
_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "concat": {"interleave": False},
    "gather": {"batch_dims": 0},
    "matmul": {"transpose_x": False, "transpose_y": False},
}


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of an array; integers of fewer than 8 bits are packed."""
    return ceil_div(num_elements(shape) * _BITS[dtype], 8)


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        kind: Operator of the MIL builder.
        name: Unique name.
        inputs: Values by parameter, lists of values, or literals that become constants of their own.
        outputs: Values it gives.
    """

    kind: str
    name: str
    inputs: Mapping[str, Any]
    outputs: tuple[Value, ...]


@dataclass(frozen=True)
class Constant:
    """An array that is part of the model.

    Attributes:
        name: Unique name in a graph.
        dtype: Of its elements; a type that numpy may not have.
        shape: Dimensions.
        load: Returns it, flat or in its shape; integers of fewer than 8 bits one a byte. Called once.
        is_shared: Whether all graphs of a package read one array under this name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray] = field(repr=False)
    is_shared: bool = True


@dataclass(frozen=True)
class Lengths:
    """What a flexible dimension may be: any length from least to most, or only these two."""

    least: int
    most: int
    is_range: bool

    def __str__(self) -> str:
        """As manifests have it."""
        return f"{self.least}{'..' if self.is_range else '|'}{self.most}"


@dataclass(frozen=True)
class Input:
    """An input of a graph.

    Attributes:
        value: What the graph reads.
        kind: A picture (RGB, 0..255), an array, or state that stays between calls.
        lengths: Of its flexible dimension, if it has one.
    """

    value: Value
    kind: Literal["tensor", "image", "state"]
    lengths: Lengths | None

    @property
    def spec(self) -> TensorSpec:
        """As manifests have it."""
        name, dtype, shape = self.value.name, self.value.dtype, self.value.shape
        if self.kind == "image":
            return TensorSpec(name, "rgb_image", shape[2:])
        lengths = self.lengths
        if lengths is None:
            return TensorSpec(name, f"{dtype}_state" if self.kind == "state" else dtype, shape)
        size = lengths.least if lengths.least == lengths.most else str(lengths)
        return TensorSpec(name, dtype, tuple(size if n == FLEXIBLE else n for n in shape))


class Graph:
    """One function of a package under construction.

    A value has the dtype of the operation that made it; an operation of another dtype casts what it reads. So
    neighboring operations that a recipe keeps in float32 form one island with casts only at its boundaries.

    Args:
        name: Name of the function.
        constants: Arrays by name that the graphs of a package share; filled as they are asked for.
        precision: Dtype of float weights in the file, and of each operation's arithmetic.
        on_bytes: Called with the number of bytes of each weight written.
        system: The oldest that can run it.
        widest: Most inputs or outputs of one linear operation, and most rows of one table.
    """

    def __init__(
        self,
        name: str,
        constants: dict[str, Constant],
        precision: FloatSettings,
        on_bytes: OnBytes,
        system: System = "iOS18",
        widest: float = math.inf,
    ) -> None:
        self.name = name
        self.widest = widest
        self.precision = precision
        self.on_bytes = on_bytes
        self.system: System = system
        self.nodes: list[Node] = []
        self.inputs: list[Input] = []
        self.outputs: list[Value] = []
        self.names_asked: set[str] = set()
        self._constants = constants
        self._values: dict[str, Value] = {}
        self._casts: dict[tuple[str, FloatName], Value] = {}

    def input(
        self,
        name: str,
        dtype: str,
        shape: Sequence[int],
        *,
        kind: Literal["tensor", "image", "state"] = "tensor",
        lengths: Lengths | None = None,
    ) -> Value:
        """Declare an input; one dimension may be `FLEXIBLE`, of the lengths given."""
        value = Value(name, dtype, tuple(shape))
        self.inputs.append(Input(value, kind, lengths))
        return value

    def output(self, x: Value) -> None:
        """Declare an output, which has the name of the value."""
        self.outputs.append(x)

    def dtype(self, name: str) -> FloatName:
        """Dtype in which the operation of a name computes."""
        self.names_asked.add(name)
        return self.precision.computes_in(name)

    def op(self, kind: str, name: str, dtype: FloatName | None = None, **inputs: Any) -> Value:  # noqa: ANN401
        """Add an operation whose float inputs are in its dtype.

        Args:
            kind: Operator of the MIL builder.
            name: Unique name; an identifier.
            dtype: Its dtype where it is not the one its own name asks for.
            **inputs: Values and literals by parameter.
        """
        dtype = dtype or self.dtype(name)
        return self.plain_op(kind, name, **{key: self._cast_all(x, dtype) for key, x in inputs.items()})

    def plain_op(self, kind: str, name: str, **inputs: Any) -> Value:  # noqa: ANN401
        """Add an operation that takes its inputs in any dtype; returns its first output."""
        return self.split_op(kind, name, **inputs)[0]

    def split_op(self, kind: str, name: str, **inputs: Any) -> tuple[Value, ...]:  # noqa: ANN401
        """Add an operation that takes its inputs in any dtype; returns all of its outputs."""
        inputs |= {key: value for key, value in _DEFAULTS.get(kind, {}).items() if key not in inputs}
        outputs = results(kind, name, inputs)
        for value in outputs:
            if value.name in self._values:
                raise AssertionError(f"function '{self.name}' has two values called '{value.name}'")
            self._values[value.name] = value
        self.nodes.append(Node(kind, name, inputs, outputs))
        return outputs

    def cast(self, x: Value, dtype: FloatName, name: str = "") -> Value:
        """The value in another dtype, cast once; anything but floats is left alone."""
        if x.dtype not in _MIL_NAMES or x.dtype == dtype:
            return x
        key = (x.name, dtype)
        if key not in self._casts:
            name = name or f"{x.name}_{dtype}"
            self._casts[key] = self.plain_op("cast", name, x=x, dtype=_MIL_NAMES[dtype])
        return self._casts[key]

    def _cast_all(self, x: Any, dtype: FloatName) -> Any:  # noqa: ANN401
        if isinstance(x, Value):
            return self.cast(x, dtype)
        if isinstance(x, list) and all(isinstance(value, Value) for value in x):
            return [self.cast(value, dtype) for value in x]
        return x

    def constant(
        self, name: str, shape: Sequence[int], make: Callable[[], np.ndarray], dtype: FloatName
    ) -> Value:
        """A table that is no weight, stored in the dtype it is used in; arguments as of `floats`."""
        return self.floats(name, shape, lambda: to_storage(make(), dtype, name), dtype, dtype)

    def floats(
        self,
        name: str,
        shape: Sequence[int],
        load: Callable[[], np.ndarray],
        storage: FloatName,
        dtype: FloatName,
    ) -> Value:
        """An array of floats, with a compile-time cast where it is stored in another dtype.

        Args:
            name: Unique name.
            shape: Dimensions.
            load: Returns it in its storage dtype.
            storage: Dtype in the file.
            dtype: Dtype it is used in.
        """
        if storage == dtype:
            return self.weight(name, storage, shape, load)
        stored, mil = self.weight(f"{name}_{storage}", storage, shape, load), _MIL_NAMES[dtype]
        if self.system == "iOS16":  # wants weights to be constants, or to come out of a constexpr operation
            return self.once(
                name, lambda: self.plain_op("constexpr_cast", name, source_val=stored, output_dtype=mil)
            )
        return self.once(name, lambda: self.plain_op("cast", name, x=stored, dtype=mil))

    def numbers(self, name: str, values: np.ndarray) -> Value:
        """An array of integers that belongs to this graph alone."""
        constant = Constant(name, values.dtype.name, values.shape, lambda: values, is_shared=False)
        return self.plain_op("const", name, val=constant)

    def weight(self, name: str, dtype: str, shape: Sequence[int], load: Callable[[], np.ndarray]) -> Value:
        """An array that lies in the package once, for all of its graphs.

        Args:
            name: Unique name.
            dtype: Of its elements; a type that numpy may not have.
            shape: Dimensions.
            load: Returns it (see `Constant`); called once, when it is written.
        """
        constant = self._constants.setdefault(name, Constant(name, dtype, tuple(shape), load))
        return self.once(name, lambda: self.plain_op("const", name, val=constant))

    def once(self, name: str, add: Callable[[], Value]) -> Value:
        """The value of a name, added unless it is there already."""
        return self._values[name] if name in self._values else add()


def scalar(dtype: FloatName, value: float) -> np.floating:
    """A number in a dtype: operations want their literals in the dtype of their inputs."""
    return np.float16(value) if dtype == "float16" else np.float32(value)


def check_patterns(component: str, graphs: Iterable[Graph]) -> None:
    """See that every pattern of `float32_ops` matched an operation of a package.

    Raises:
        RecipeError: Names the pattern that matched none.
    """
    graphs = list(graphs)
    names = {name for graph in graphs for name in graph.names_asked}
    for pattern in graphs[0].precision.float32_ops:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(sorted(names)[:_FEW])
            raise RecipeError(
                f"{component}.float32_ops: '{pattern}' matches no operation",
                hint=f"operations are called {known}, ...; `fastvlm-convert scan` lists them",
            )
