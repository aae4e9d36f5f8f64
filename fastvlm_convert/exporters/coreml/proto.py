"""Write the graphs of a package as an .mlpackage: in place, and with bytes that depend on inputs alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import coremltools
import numpy as np
from coremltools.converters.mil import Builder as mb  # noqa: N813  coremltools' own convention
from coremltools.converters.mil.backend.mil.load import load
from coremltools.converters.mil.mil import Function, Program, Var, get_new_symbol, types
from coremltools.converters.mil.mil.types.symbolic import is_symbolic
from coremltools.proto import Model_pb2

from fastvlm_convert.errors import OutputError
from fastvlm_convert.exporters.coreml.data import LazyArray, is_inline
from fastvlm_convert.exporters.coreml.graph import Constant, Graph, Input, Node
from fastvlm_convert.exporters.coreml.metadata import AUTHOR, Metadata
from fastvlm_convert.exporters.coreml.paths import FILES, package_manifest
from fastvlm_convert.exporters.coreml.values import FLEXIBLE, Value

_SYSTEMS: Final = {"iOS16": coremltools.target.iOS16, "iOS18": coremltools.target.iOS18}
_TYPES: Final = {"float32": types.fp32, "float16": types.fp16, "int32": types.int32}
# What arrays are to coremltools where numpy has no such type. In memory they have a byte for each number.
_NARROW: Final[dict[str, Any]] = {
    "int4": types.np_int4_dtype,
    "uint4": types.np_uint4_dtype,
    "uint6": types.np_uint6_dtype,
}


def write_package(path: Path, graphs: Sequence[Graph], metadata: Metadata) -> None:
    """Write a package.

    Args:
        path: The .mlpackage folder to make.
        graphs: Its functions; the first runs when none is named.
        metadata: What stands inside for people.

    Raises:
        RecipeError: A weight does not fit its storage dtype.
        CheckpointError: A weight cannot be read, or is not finite.
        OutputError: The weights cannot be written.
    """
    program, arrays = Program(), dict[str, np.ndarray]()
    for graph in graphs:
        program.add_function(graph.name, _function(graph, arrays))
    program.default_function_name = graphs[0].name
    program.export_as_multifunction = len(graphs) > 1
    program.skip_all_passes = True  # they would see the zeros of lazy weights
    weights_folder = (path / FILES[2]).parent
    weights_folder.mkdir(parents=True)
    program.validate()
    try:
        model = load(
            program,
            weights_dir=str(weights_folder),
            specification_version=_SYSTEMS[graphs[0].system].value,
            convert_to="mlprogram",
            convert_from="milinternal",
        )
    except RuntimeError as error:  # coremltools' writer of weights keeps the system's reason to itself
        if "while writing" not in str(error):
            raise
        hint = "see that there is room and that you may write there"
        raise OutputError(f"cannot write the weights: {error}", where=weights_folder, hint=hint) from error
    _check_all_written(arrays)
    _describe(model, metadata)
    content = model.SerializeToString(deterministic=True)
    (path / FILES[1]).write_bytes(content)
    (path / FILES[0]).write_text(package_manifest(content), encoding="utf-8")


def _check_all_written(arrays: Mapping[str, np.ndarray]) -> None:
    """Every weight must have been read exactly once: never zeros in the file, never the work twice."""
    for name, array in arrays.items():
        if isinstance(array, LazyArray) and array.num_reads != 1:
            raise AssertionError(f"weight '{name}' was written {array.num_reads} times")


def _function(graph: Graph, arrays: dict[str, np.ndarray]) -> Function:
    """A graph as coremltools' function; `arrays` holds the shared constants of all."""
    inputs = {given.value.name: _placeholder(given) for given in graph.inputs}
    with Function(inputs, opset_version=_SYSTEMS[graph.system]) as function:
        # coremltools numbers automatic names through the whole process; bytes must not depend on that.
        mb.name_count.clear()
        values: dict[str, Var] = dict(function.inputs)
        for node in graph.nodes:
            for value, made in zip(node.outputs, _outputs(node, values, arrays), strict=True):
                _check_same(node, value, made)
                values[value.name] = made
        function.set_outputs([values[value.name] for value in graph.outputs])
    if declared := _input_types(graph):
        function.set_input_types(declared)
    return function


def _placeholder(given: Input) -> Any:  # noqa: ANN401
    shape = [get_new_symbol() if n == FLEXIBLE else n for n in given.value.shape]
    make = mb.StateTensorSpec if given.kind == "state" else mb.TensorSpec
    return make(tuple(shape), _TYPES[given.value.dtype])


def _outputs(node: Node, values: Mapping[str, Var], arrays: dict[str, np.ndarray]) -> Sequence[Var]:
    if node.kind == "const":
        constant: Constant = node.inputs["val"]
        if not constant.is_shared:
            return [mb.const(val=constant.load(), name=node.name)]
        if constant.name not in arrays:
            arrays[constant.name] = _array(constant)
        made = mb.const(val=arrays[constant.name], name=node.name)
        made.op.weight_id = constant.name
        return [made]
    inputs = {key: _as_vars(x, values) for key, x in node.inputs.items()}
    made = getattr(mb, node.kind)(name=node.name, **inputs)
    outputs: list[Var] = list(made) if isinstance(made, list | tuple) else [made]
    if set(outputs[0].op.inputs) != set(node.inputs):
        raise AssertionError(f"coremltools gave {node.kind} '{node.name}' other inputs than the graph")
    return outputs


def _as_vars(x: Any, values: Mapping[str, Var]) -> Any:  # noqa: ANN401
    if isinstance(x, Value):
        return values[x.name]
    if isinstance(x, list):
        return [_as_vars(part, values) for part in x]
    return x


def _array(constant: Constant) -> np.ndarray:
    """What coremltools is given: the array itself where it is small, else one that is read while writing."""
    dtype = _NARROW.get(constant.dtype, constant.dtype)
    in_memory = np.int8 if constant.dtype == "int4" else np.uint8 if constant.dtype in _NARROW else dtype

    def read() -> np.ndarray:
        return constant.load().astype(in_memory, copy=False).view(dtype).reshape(constant.shape)

    return read() if is_inline(constant.shape) else LazyArray(constant.shape, dtype, read)


def _check_same(node: Node, value: Value, made: Var) -> None:
    """See that a graph says of a value what coremltools makes of it: sizes are predicted from the graph."""
    shape = tuple(FLEXIBLE if is_symbolic(n) else int(n) for n in made.shape or ())
    dtype = types.builtin_to_string(made.dtype)
    names = {"fp32": "float32", "fp16": "float16"}
    if (made.name, names.get(dtype, dtype), shape) != (value.name, value.dtype, value.shape):
        raise AssertionError(f"{node.kind} gives '{made.name}' {dtype} {list(shape)}, not {value}")


def _input_types(graph: Graph) -> tuple[Any, ...]:
    """What is declared beyond dtypes and fixed shapes: pictures and flexible lengths; states never are."""
    given = [each for each in graph.inputs if each.kind != "state"]
    is_plain = all(each.kind == "tensor" and each.lengths is None for each in given)
    return () if is_plain else tuple(_input_type(each) for each in given)


def _input_type(given: Input) -> Any:  # noqa: ANN401
    name, shape, lengths = given.value.name, given.value.shape, given.lengths
    if given.kind == "image":
        colors = coremltools.colorlayout.RGB
        return coremltools.ImageType(name, shape, color_layout=colors, channel_first=True)
    dtype = np.dtype(given.value.dtype).type
    if lengths is None:
        return coremltools.TensorType(name, shape, dtype=dtype)

    def of(length: Any) -> tuple[Any, ...]:  # noqa: ANN401
        return tuple(length if n == FLEXIBLE else n for n in shape)

    if lengths.is_range:
        any_length = coremltools.RangeDim(lengths.least, lengths.most, default=lengths.least)
        return coremltools.TensorType(name, of(any_length), dtype=dtype)
    both = [of(lengths.least), of(lengths.most)]
    return coremltools.TensorType(name, coremltools.EnumeratedShapes(both, default=both[0]), dtype=dtype)


def _describe(model: Model_pb2.Model, metadata: Metadata) -> None:
    """Write the metadata and drop the conversion date."""
    description = model.description
    for key in [k for k in description.metadata.userDefined if k.endswith("conversion_date")]:
        del description.metadata.userDefined[key]
    if "buildInfo" in model.mlProgram.attributes:
        del model.mlProgram.attributes["buildInfo"]
    description.metadata.author = AUTHOR
    description.metadata.license = metadata.license
    description.metadata.shortDescription = metadata.description
    for key, value in metadata.details.items():
        description.metadata.userDefined[key] = value
    description.metadata.versionString = metadata.version
    for function in description.functions or [description]:
        name = function.name if description.functions else ""
        for feature in (*function.input, *function.output, *function.state):
            feature.shortDescription = metadata.feature(name, feature.name)
