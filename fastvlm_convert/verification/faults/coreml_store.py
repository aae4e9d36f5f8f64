"""Stored constants of Core ML packages: the program, and the weight file beside it."""

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np

from fastvlm_convert.exporters.coreml.data import ALIGNMENT
from fastvlm_convert.io_names import EMBED, LOGITS, Component
from fastvlm_convert.mil.package import Package, open_package
from fastvlm_convert.mil.types import TensorType, tensor_type
from fastvlm_convert.verification.faults.bundle_copy import Copy
from fastvlm_convert.verification.faults.constants import Change, Constant, rows_of
from fastvlm_convert.verification.faults.fault import NotApplicableError

_RECORD: Final = struct.Struct("<IIQQ")  # see `mil.blob`
_ROLES: Final = {
    "data": "q", "scale": "scale", "offset": "zero_point", "indices": "indices", "lut": "lut",
}  # fmt: skip


@dataclass(frozen=True)
class Program:
    """A package of a copy.

    Attributes:
        copy: The copy.
        file: The program's file, relative to the bundle.
        package: The opened package.
    """

    copy: Copy
    file: str
    package: Package

    def save(self) -> None:
        """Write the program back."""
        self.copy.owned(self.file).write_bytes(self.package.spec.SerializeToString())

    def blocks(self, functions: Collection[str] = ()) -> Iterator[Any]:
        """The blocks of some functions; of all by default."""
        for name, function in self.package.spec.mlProgram.functions.items():
            if name in functions or not functions:
                yield from function.block_specializations.values()

    def read(self, value: Any) -> np.ndarray:  # noqa: ANN401  a protobuf message
        """Elements of a constant in the weight file; bytes by row where they are packed."""
        kind = _type(value)
        start, size = self._span(value)
        content = np.fromfile(self.copy.path / self._weights(value), np.uint8, size, offset=start)
        shape = kind.fixed_shape or ()
        if kind.element.bits < 8:
            return rows_of(content, shape)
        return content.view(kind.element.numpy).reshape(shape)

    def write(self, value: Any, values: np.ndarray) -> None:  # noqa: ANN401
        """Put other elements in the place of a constant's."""
        with self.copy.owned(self._weights(value)).open("r+b") as file:
            file.seek(self._span(value)[0])
            file.write(np.ascontiguousarray(values).tobytes())

    def append(self, value: Any, values: np.ndarray) -> None:  # noqa: ANN401
        """Store a constant's elements once more, changed, for one user of them; `save` comes after."""
        content = np.ascontiguousarray(values).tobytes()
        with self.copy.owned(self._weights(value)).open("r+b") as file:
            file.seek(value.blobFileValue.offset)
            record = bytearray(file.read(ALIGNMENT))
            sentinel, kind, size, _ = _RECORD.unpack_from(record)
            end = file.seek(0, 2)
            begin = end + -end % ALIGNMENT
            _RECORD.pack_into(record, 0, sentinel, kind, size, begin + ALIGNMENT)
            file.write(bytes(begin - end) + record + content)
        value.blobFileValue.offset = begin

    def _weights(self, value: Any) -> str:  # noqa: ANN401
        name = value.blobFileValue.fileName.removeprefix("@model_path/")
        return str(PurePosixPath(self.file).parent / name)

    def _span(self, value: Any) -> tuple[int, int]:  # noqa: ANN401
        kind = _type(value)
        weights = self.package.weight_file(value.blobFileValue.fileName)
        return weights.span(value.blobFileValue.offset, kind.element, kind.fixed_shape or (), "a constant")


def open_program(copy: Copy, component: Component) -> Program:
    """The package of a component; of a decoder in several, the last, where the head is."""
    return _open(copy, coreml_packages(copy, component)[-1])


def coreml_packages(copy: Copy, component: Component) -> list[str]:
    """The packages of a component, relative to the bundle, in the order in which they run."""
    files = [a.files[0] for a in copy.manifest.artifacts if (a.target, a.component) == ("coreml", component)]
    folders = (next(p for p in PurePosixPath(f).parents if p.suffix == ".mlpackage") for f in files)
    return list(dict.fromkeys(str(folder) for folder in folders))


def _open(copy: Copy, folder: str) -> Program:
    package = open_package(copy.path / folder)
    (program,) = (p for p in package.folder.glob("*.mlmodel"))
    return Program(copy, program.relative_to(copy.path.resolve()).as_posix(), package)


def constants(copy: Copy, component: Component) -> dict[str, Constant]:
    """See `constants.Store`."""
    return {
        name: Constant(name, _type(value).element.bits, _type(value).fixed_shape or ())
        for folder in coreml_packages(copy, component)
        for name, value in _by_name(_open(copy, folder)).items()
    }


def edit(copy: Copy, component: Component, name: str, change: Change) -> None:
    """See `constants.Store`; what every package has is changed in each."""
    for folder in coreml_packages(copy, component):
        program = _open(copy, folder)
        if (value := _by_name(program).get(name)) is not None:
            program.write(value, change(program.read(value)))


def edit_head(copy: Copy, change: Change) -> None:
    """See `constants.Store`."""
    program = open_program(copy, "decoder")
    parts = 0
    for block in program.blocks([n for n in program.package.spec.mlProgram.functions if n != EMBED]):
        makers = {output.name: o for o in block.operations for output in o.outputs}
        heads = [o for o in block.operations if o.type == "linear" and o.outputs[0].name.startswith(LOGITS)]
        for head in heads:
            stored = next(_stored(makers, head.inputs["weight"].arguments[0].name), None)
            if stored is not None:
                program.append(stored, change(program.read(stored)))
                parts += 1
    if not parts:
        raise NotApplicableError("the head's table is no constant of its product")
    program.save()


def _stored(makers: dict[str, Any], name: str) -> Iterator[Any]:
    """The integers or floats that a weight is made from."""
    operation = makers.get(name)
    if operation is None:
        return
    for role, value in _values(operation):
        if role in ("val", "data", "indices"):
            yield value
    for role in ("data", "x"):  # of scales on a palette, and of a cast
        for argument in operation.inputs[role].arguments if role in operation.inputs else ():
            yield from _stored(makers, argument.name)


def _by_name(program: Program) -> dict[str, Any]:
    """Constants in the weight file by the name that all targets share; those of several functions once."""
    found: dict[str, Any] = {}
    for block in program.blocks():
        for operation in block.operations:
            name = operation.outputs[0].name if operation.outputs else ""
            for dtype in ("_float16", "_float32"):
                name = name.removesuffix(dtype)
            name = name.replace("_weight", "").replace("_unscaled", "")
            for role, value in _values(operation):
                found.setdefault(f"{name}_{_ROLES[role]}" if role in _ROLES else name, value)
    return found


def _values(operation: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Values of an operation that lie in the weight file, each with what it is to the operation."""
    for role, value in operation.attributes.items():
        if value.HasField("blobFileValue"):
            yield role, value
    for role, binding in operation.inputs.items():
        for argument in binding.arguments:
            if argument.HasField("value") and argument.value.HasField("blobFileValue"):
                yield role, argument.value


def _type(value: Any) -> TensorType:  # noqa: ANN401
    kind = tensor_type(value.type, "a constant")
    assert kind is not None, "the weight file holds tensors"
    return kind
