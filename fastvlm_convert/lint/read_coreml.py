"""Core ML packages as plain data. Importing this module needs coremltools' protobuf classes."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fastvlm_convert.lint.facts import CoreMLProgram, MilFunction, MilOperation, Region, Tensor
from fastvlm_convert.manifest import Artifact, Manifest
from fastvlm_convert.mil.description import describe_functions, function_block
from fastvlm_convert.mil.package import Package, open_package
from fastvlm_convert.mil.types import tensor_type


def read_programs(bundle: Path, manifest: Manifest) -> tuple[CoreMLProgram, ...]:
    """Every Core ML package of a bundle.

    Raises:
        BundleError: One is damaged.
    """
    packages: dict[str, Artifact] = {}
    for artifact in manifest.artifacts:
        if artifact.target == "coreml":
            packages.setdefault(_folder(artifact), artifact)
    return tuple(_read(bundle, folder, artifact) for folder, artifact in packages.items())


def _folder(artifact: Artifact) -> str:
    """The package of an artifact: the first folder on the way to its first file that is called so."""
    path = PurePosixPath(artifact.files[0])
    return next((str(p) for p in reversed(path.parents) if p.suffix == ".mlpackage"), str(path.parent))


def _read(bundle: Path, folder: str, artifact: Artifact) -> CoreMLProgram:
    package = open_package(bundle / folder)
    tensors: dict[Region, Tensor] = {}
    functions = []
    for name, spec in describe_functions(package).items():
        operations = tuple(_operation(bundle, package, o) for o in _operations(function_block(package, name)))
        for operation in operations:
            for tensor in operation.constants.values():
                if tensor.region is not None:
                    tensors.setdefault(tensor.region, tensor)
        functions.append(MilFunction(name, operations, {state.name: state.shape for state in spec.states}))
    return CoreMLProgram(
        file=folder,
        component=artifact.component,
        storage=artifact.storage,
        compute=artifact.compute,
        specification_version=package.spec.specificationVersion,
        functions=tuple(functions),
        tensors=tuple(tensors.values()),
    )


def _operations(block: Any) -> Iterator[Any]:  # noqa: ANN401
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def _operation(bundle: Path, package: Package, operation: Any) -> MilOperation:  # noqa: ANN401
    name = operation.outputs[0].name if operation.outputs else ""
    inputs: dict[str, tuple[str, ...]] = {}
    constants: dict[str, Tensor] = {}
    for key, value in operation.inputs.items():
        inputs[key] = tuple(a.name for a in value.arguments if a.WhichOneof("binding") == "name")
        for argument in value.arguments:
            if argument.WhichOneof("binding") == "value":
                _add(constants, key, _constant(bundle, package, name, argument.value))
    for key, value in operation.attributes.items():
        if key != "name":
            _add(constants, key, _constant(bundle, package, name, value))
    declared = tensor_type(operation.outputs[0].type, name) if operation.outputs else None
    return MilOperation(operation.type, name, inputs, constants, () if declared is None else declared.shape)


def _add(constants: dict[str, Tensor], key: str, tensor: Tensor | None) -> None:
    if tensor is not None:
        constants[key] = tensor


def _constant(bundle: Path, package: Package, name: str, value: Any) -> Tensor | None:  # noqa: ANN401
    """A constant tensor; None for a text or a list."""
    declared = tensor_type(value.type, name)
    if declared is None or declared.fixed_shape is None:
        return None
    element, shape = declared.element, declared.fixed_shape
    region = None
    if value.WhichOneof("value") == "blobFileValue":
        file = package.weight_file(value.blobFileValue.fileName)
        start, count = file.span(value.blobFileValue.offset, element, shape, name)
        region = Region(file.path.relative_to(bundle.resolve()).as_posix(), start, count)
    return Tensor(name, element.name, shape, region)
