"""What rules look at: graphs, programs and the manifest as plain data, read from a bundle's files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastvlm_convert.io_names import Component
from fastvlm_convert.manifest import Artifact, Manifest
from fastvlm_convert.targets import Target


@dataclass(frozen=True)
class Region:
    """Where the bytes of a tensor are.

    Attributes:
        file: Relative to the bundle.
        offset: Of the first byte in the file.
        length: In bytes.
    """

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Tensor:
    """A stored constant.

    Attributes:
        name: As in its file.
        dtype: Name of its element type: `float32`, `uint4`.
        shape: Its dimensions.
        region: Where its bytes are; None where they are inside the graph or the program.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    region: Region | None


@dataclass(frozen=True)
class OnnxNode:
    """One node of a graph, or of a graph inside it.

    Attributes:
        op: Type of the operator.
        domain: Empty for ONNX's own.
        name: Its first output.
        inputs: Names; empty where one is left out.
        integers: Its integer attributes.
    """

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    integers: Mapping[str, int]

    @property
    def full_op(self) -> str:
        """Domain and type, as tables of operators have it."""
        return f"{self.domain or 'ai.onnx'}:{self.op}"


@dataclass(frozen=True)
class OnnxGraph:
    """One .onnx file.

    Attributes:
        file: Relative to the bundle.
        artifact: What the manifest says of it.
        ir_version: Of the file format.
        opsets: Versions by domain.
        nodes: In order.
        tensors: Initializers.
        cast_to: Dtype of what a Cast makes, by its output.
    """

    file: str
    artifact: Artifact
    ir_version: int
    opsets: Mapping[str, int]
    nodes: tuple[OnnxNode, ...]
    tensors: tuple[Tensor, ...]
    cast_to: Mapping[str, str]

    def dtype_of(self, name: str) -> str | None:
        """Dtype of an initializer or of what a Cast makes; None of anything else."""
        return self.cast_to.get(name) or next((t.dtype for t in self.tensors if t.name == name), None)


@dataclass(frozen=True)
class MilOperation:
    """One operation of a program.

    Attributes:
        type: What it does.
        name: Its first output.
        inputs: Names of values by parameter.
        constants: Parameters that are constants written into the operation itself.
        shape: Of the first output; None for an axis of any size.
    """

    type: str
    name: str
    inputs: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, Tensor]
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class MilFunction:
    """One function of a program.

    Attributes:
        name: What it is called.
        operations: In order, those of nested blocks included.
        states: Shapes by name.
    """

    name: str
    operations: tuple[MilOperation, ...]
    states: Mapping[str, tuple[int | None, ...]]

    def consumers(self, name: str) -> Iterator[MilOperation]:
        """Operations that read a value, looking through what only unpacks weights."""
        for operation in self.operations:
            if any(name in names for names in operation.inputs.values()):
                if operation.type.startswith("constexpr_"):
                    yield from self.consumers(operation.name)
                else:
                    yield operation


@dataclass(frozen=True)
class CoreMLProgram:
    """One .mlpackage.

    Attributes:
        file: Its folder, relative to the bundle.
        component: Part of the model.
        storage: Dtype of its floats, as the manifest says.
        compute: Dtype of its arithmetic, as the manifest says.
        specification_version: Of the file format, which tells the oldest system.
        functions: All of them.
        tensors: Its weights, those that functions share once.
    """

    file: str
    component: Component
    storage: str
    compute: str
    specification_version: int
    functions: tuple[MilFunction, ...]
    tensors: tuple[Tensor, ...]

    def operations(self, *types: str) -> list[MilOperation]:
        """All operations of some types, those that functions share by name once."""
        found = {o.name: o for f in self.functions for o in f.operations if o.type in types}
        return list(found.values())


@dataclass(frozen=True)
class Facts:
    """A bundle as rules see it.

    Attributes:
        bundle: Its folder.
        manifest: Its manifest.
        graphs: Its ONNX graphs.
        programs: Its Core ML packages.
        unread: Why a target's files could not be read, by target.
        duplicates: Groups of tensors with the same bytes in different places, by target.
        max_positions: Positions that the model was trained for, as config.json says; None where it does not.
        int8_activations: What `verify --record` found about ONNX Runtime's own rounding.
    """

    bundle: Path
    manifest: Manifest
    graphs: tuple[OnnxGraph, ...]
    programs: tuple[CoreMLProgram, ...]
    unread: Mapping[Target, str]
    duplicates: Mapping[Target, tuple[tuple[Tensor, ...], ...]]
    max_positions: int | None
    int8_activations: Literal["passed", "failed", "not_run"]
