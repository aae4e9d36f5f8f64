"""What is in a package: its functions, operations and weights. Nothing is decoded, torch is not needed."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.description import (
    DEFAULT_FUNCTION,
    FunctionSpec,
    default_function,
    describe_functions,
    function_block,
    metadata,
)
from fastvlm_convert.mil.package import Package, open_package
from fastvlm_convert.mil.types import Message, tensor_type


@dataclass(frozen=True)
class FunctionSurvey:
    """One function.

    Attributes:
        spec: What it takes and gives.
        opset: The set of operations it is written in.
        operations: How often each operation occurs, constants left out, the most frequent first.
    """

    spec: FunctionSpec
    opset: str
    operations: dict[str, int]


@dataclass(frozen=True)
class Survey:
    """A whole package.

    Attributes:
        specification_version: Version of the file format.
        deployment_target: The oldest system it runs on.
        default_function: The function that runs when none is named.
        functions: By name.
        weight_bytes: Stored bytes of weights by element type; those that functions share count once.
        metadata: What the author wrote into it.
    """

    specification_version: int
    deployment_target: str
    default_function: str
    functions: dict[str, FunctionSurvey]
    weight_bytes: dict[str, int]
    metadata: dict[str, str]


def survey_package(path: Path) -> Survey:
    """Read what is in a package. The functions of a pipeline's stages are called `stage 0, main` and so on.

    Raises:
        BundleError: It is no package, or damaged.
    """
    package = open_package(path)
    functions = _survey_functions(package)
    default = default_function(package) if functions else DEFAULT_FUNCTION
    weights = _stored_weights(package)
    for label, stage in _stages(package, ""):
        functions |= {f"{label}{name}": found for name, found in _survey_functions(stage).items()}
        weights |= _stored_weights(stage)
    total: Counter[str] = Counter()
    for kind, count in weights.values():
        total[kind] += count
    return Survey(
        package.spec.specificationVersion,
        package.deployment_target,
        default,
        functions,
        dict(total.most_common()),
        metadata(package),
    )


def _stages(package: Package, label: str) -> Iterator[tuple[str, Package]]:
    for i, stage in enumerate(package.stages()):
        yield f"{label}stage {i}, ", stage
        yield from _stages(stage, f"{label}stage {i}, ")


def _survey_functions(package: Package) -> dict[str, FunctionSurvey]:
    """The functions of an ML program; none of a pipeline."""
    functions = {}
    for name, spec in describe_functions(package).items() if not package.stages() else ():
        counts = Counter(o.type for o in _operations(function_block(package, name)) if o.type != "const")
        opset = package.spec.mlProgram.functions[name].opset
        functions[name] = FunctionSurvey(spec, opset, dict(counts.most_common()))
    return functions


def _operations(block: Message) -> Iterator[Message]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def _stored_weights(package: Package) -> dict[tuple[str, int], tuple[str, int]]:
    """Element type and bytes of every weight, by file and place."""
    found: dict[tuple[str, int], tuple[str, int]] = {}
    for name in package.spec.mlProgram.functions:
        for operation in _operations(function_block(package, name)):
            values = [*operation.attributes.values()]
            values += [a.value for i in operation.inputs.values() for a in i.arguments if a.HasField("value")]
            for value in values:
                if value.WhichOneof("value") == "blobFileValue":
                    place = (value.blobFileValue.fileName, value.blobFileValue.offset)
                    found[place] = _stored(package, value)
    return found


def _stored(package: Package, value: Message) -> tuple[str, int]:
    """Element type and bytes of a value in a weight file."""
    declared = tensor_type(value.type, "a weight")
    if declared is None or declared.fixed_shape is None or not declared.element.bits:
        raise BundleError("a weight in a file is not a tensor of known shape", where=package.path)
    file = package.weight_file(value.blobFileValue.fileName)
    span = file.span(value.blobFileValue.offset, declared.element, declared.fixed_shape, "a weight")
    return declared.element.name, span[1]
