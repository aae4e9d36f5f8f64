"""Write a program as an .mlpackage: in place, and with bytes that depend on inputs alone."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import coremltools
from coremltools.converters.mil.backend.mil.load import load
from coremltools.converters.mil.mil import Function, Program
from coremltools.proto import Model_pb2

from fastvlm_convert.errors import OutputError
from fastvlm_convert.exporters.coreml.paths import AUTHOR, FILES, SPEC
from fastvlm_convert.exporters.coreml.weights import Weights


@dataclass(frozen=True)
class Metadata:
    """What stands inside a package for the people who use it.

    Attributes:
        description: One paragraph.
        author: Who made the model.
        license: Its license.
        details: More facts by name.
        features: Description of every input, output and state by name.
    """

    description: str
    author: str
    license: str
    details: Mapping[str, str]
    features: Mapping[str, str]


def write_package(
    path: Path,
    functions: Mapping[str, Function],
    default: str,
    target: coremltools.target,
    weights: Weights,
    metadata: Metadata,
) -> Model_pb2.Model:
    """Write a package.

    Args:
        path: The .mlpackage folder to make.
        functions: The functions by name.
        default: The one that runs when none is named.
        target: Oldest system that can run it.
        weights: Where the functions' constants come from.
        metadata: What stands inside for people.

    Returns:
        The model as it was written.

    Raises:
        OutputError: The weights cannot be written.
    """
    program = Program()
    for name, function in functions.items():
        program.add_function(name, function)
        _check_unique(name, function)
    program.default_function_name = default
    program.export_as_multifunction = len(functions) > 1
    program.skip_all_passes = True  # they would see the zeros of lazy weights
    weights_folder = (path / FILES[2]).parent
    weights_folder.mkdir(parents=True)
    program.validate()
    try:
        model = load(
            program,
            weights_dir=str(weights_folder),
            specification_version=target.value,
            convert_to="mlprogram",
            convert_from="milinternal",
        )
    except RuntimeError as error:  # coremltools' writer of weights keeps the system's reason to itself
        if "while writing" not in str(error):
            raise
        hint = "see that there is room and that you may write there"
        raise OutputError(f"cannot write the weights: {error}", where=weights_folder, hint=hint) from error
    weights.check_all_written()
    _describe(model, metadata)
    content = model.SerializeToString(deterministic=True)
    (path / FILES[1]).write_bytes(content)
    (path / FILES[0]).write_text(_manifest(content), encoding="utf-8")
    return model


def _check_unique(name: str, function: Function) -> None:
    seen: set[str] = set()
    for operation in function.operations:
        for output in operation.outputs:
            if output.name in seen:
                raise AssertionError(f"function '{name}' has two values called '{output.name}'")
            seen.add(output.name)


def _describe(model: Model_pb2.Model, metadata: Metadata) -> None:
    """Write the metadata and drop the conversion date."""
    description = model.description
    for key in [k for k in description.metadata.userDefined if k.endswith("conversion_date")]:
        del description.metadata.userDefined[key]
    if "buildInfo" in model.mlProgram.attributes:
        del model.mlProgram.attributes["buildInfo"]
    description.metadata.author = metadata.author
    description.metadata.license = metadata.license
    description.metadata.shortDescription = metadata.description
    for key, value in metadata.details.items():
        description.metadata.userDefined[key] = value
    for function in description.functions or [description]:
        for feature in (*function.input, *function.output, *function.state):
            feature.shortDescription = metadata.features[feature.name]


def _manifest(content: bytes) -> str:
    """Manifest.json as coremltools writes it, but with ids that come from the content."""
    model_id, weights_id = (
        str(uuid.uuid5(uuid.NAMESPACE_URL, text))
        for text in (f"model:{hashlib.sha256(content).hexdigest()}", "weights")
    )

    def entry(description: str, name: str) -> dict[str, str]:
        return {"author": AUTHOR, "description": description, "name": name, "path": f"{AUTHOR}/{name}"}

    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            model_id: entry("CoreML Model Specification", SPEC),
            weights_id: entry("CoreML Model Weights", "weights"),
        },
        "rootModelIdentifier": model_id,
    }
    return json.dumps(manifest, indent=4, sort_keys=True, allow_nan=False) + "\n"
