"""ONNX graphs as plain data. Their weights stay in their files; only where they are is read."""

import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from fastvlm_convert.errors import BundleError, MissingDependencyError
from fastvlm_convert.lint.facts import OnnxGraph, OnnxNode, Region, Tensor
from fastvlm_convert.manifest import Artifact, Manifest
from fastvlm_convert.regular_file import read_file

_MAX_GRAPH_BYTES: Final = (1 << 31) - 1  # what a protobuf message may have
_AGAIN: Final = "copy the bundle again, or export it again"


def read_graphs(bundle: Path, manifest: Manifest) -> tuple[OnnxGraph, ...]:
    """Every ONNX graph of a bundle.

    Raises:
        BundleError: One is damaged.
        MissingDependencyError: onnx is not installed.
    """
    own = [a for a in manifest.artifacts if a.target == "onnx"]
    return tuple(_read(bundle, manifest, artifact) for artifact in own)


def _read(bundle: Path, manifest: Manifest, artifact: Artifact) -> OnnxGraph:
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "looking into ONNX graphs") from error
    file = artifact.files[0]
    try:
        content = read_file(bundle / file, _MAX_GRAPH_BYTES)
        model = onnx.ModelProto.FromString(content)
    except (OSError, DecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise BundleError(f"cannot read the graph: {what}", where=bundle / file, hint=_AGAIN) from error
    nodes = tuple(_node(n, onnx) for n in _nodes(model.graph, onnx))
    return OnnxGraph(
        file=file,
        artifact=artifact,
        ir_version=model.ir_version,
        opsets={o.domain or "ai.onnx": o.version for o in model.opset_import},
        nodes=nodes,
        tensors=tuple(_tensors(model, file, content, manifest, onnx)),
        cast_to={n.name: _dtype(n.integers["to"], onnx) for n in nodes if n.op == "Cast"},
    )


def _nodes(graph: Any, onnx: Any) -> Iterator[Any]:  # noqa: ANN401
    """The nodes of a graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g, onnx)
            for inner in attribute.graphs:
                yield from _nodes(inner, onnx)


def _node(node: Any, onnx: Any) -> OnnxNode:  # noqa: ANN401
    integers = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
    domain = "" if node.domain == "ai.onnx" else node.domain
    return OnnxNode(node.op_type, domain, next(iter(node.output), ""), tuple(node.input), integers)


def _tensors(
    model: Any,  # noqa: ANN401
    file: str,
    content: bytes,
    manifest: Manifest,
    onnx: Any,  # noqa: ANN401
) -> Iterator[Tensor]:
    end = 0
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            region: Region | None = _external(tensor, file, manifest)
        elif tensor.raw_data and (start := content.find(tensor.raw_data, end)) >= 0:
            end = start + len(tensor.raw_data)  # in the order of the file, so that equal ones stay apart
            region = Region(file, start, len(tensor.raw_data))
        else:
            region = None
        yield Tensor(tensor.name, _dtype(tensor.data_type, onnx), tuple(tensor.dims), region)


def _external(tensor: Any, file: str, manifest: Manifest) -> Region:  # noqa: ANN401
    facts = {entry.key: entry.value for entry in tensor.external_data}
    path = posixpath.normpath(posixpath.join(posixpath.dirname(file), facts.get("location", "")))
    if path not in manifest.files:
        raise BundleError(f"'{tensor.name}' is in '{path}', which is not the bundle's", where=file)
    size = manifest.files[path].size
    try:
        offset = int(facts.get("offset", 0))
        length = int(facts.get("length", size - offset))
    except ValueError as error:
        raise BundleError(f"the place of '{tensor.name}' is no number", where=file) from error
    if min(offset, length) < 0 or offset + length > size:
        raise BundleError(f"'{tensor.name}' lies outside '{path}'", where=file)
    return Region(path, offset, length)


def _dtype(number: int, onnx: Any) -> str:  # noqa: ANN401
    """The name of an element type as numpy and the manifest have it."""
    try:
        name = str(onnx.TensorProto.DataType.Name(number)).lower()
    except ValueError:
        return f"type {number}"
    return {"float": "float32", "double": "float64"}.get(name, name)
