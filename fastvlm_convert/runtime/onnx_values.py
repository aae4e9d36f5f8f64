"""What the operations of a bundle's ONNX graphs give: copies in memory whose values are outputs.

Of the encoder's, which are gigabytes at 1024 pixels, the graph itself picks the rows that are compared, so
that one run gives all of them. ONNX Runtime fuses fewer operations where it must hand out what lies between
them, so the last bits may differ from those of the graph as it is shipped.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import onnx
import onnxruntime

from fastvlm_convert.io_names import (
    ATTENTION_MASK,
    IMAGE_FEATURES,
    INPUTS_EMBEDS,
    PIXEL_VALUES,
    Component,
    decoder_op,
    op_component,
)
from fastvlm_convert.manifest import Manifest
from fastvlm_convert.runtime.onnx_graphs import refusals, session_of, without_int8_activations

_TARGET: Final = "onnx"
_AT_ONCE: Final = 1 << 30  # bytes of values that one run hands out
_MAP_RANK: Final = 4

_OnValue = Callable[[str, np.ndarray], None]


class Values(Protocol):
    """What takes the results of operations."""

    def add(self, name: str, values: np.ndarray) -> None:
        """Take a whole result."""

    def add_rows(self, name: str, rows: np.ndarray) -> None:
        """Take the rows of a result that are wanted, [rows, width]."""


@dataclass(frozen=True)
class Wanted:
    """What is to be seen of an operation's result.

    Attributes:
        num_bytes: Of the whole result, as float32.
        num_rows: Positions of a picture, or tokens.
        rows: Which of them, int64, ascending.
    """

    num_bytes: int
    num_rows: int
    rows: np.ndarray


def onnx_values(
    bundle: Path,
    manifest: Manifest,
    inputs: Mapping[Component, np.ndarray],
    wanted: Mapping[str, Wanted],
    values: Values,
    *,
    exact: bool,
) -> None:
    """Run the encoder and the decoder, and report what their operations give.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        inputs: Of `vision` pixel values, float32 [1, 3, S, S]; of `decoder` embeddings of a prompt, float32
            [n, hidden]. What is not there is not run.
        wanted: Operations to report.
        values: Gets the wanted rows of the encoder's operations, and whole results of the decoder's.
        exact: Whether quantized matrices multiply float activations.

    Raises:
        BundleError: ONNX Runtime refuses a graph.
    """
    for component, given in inputs.items():
        path = bundle / manifest.artifact(_TARGET, component).files[0]
        with refusals(path):
            model = onnx.load(path, load_external_data=False)
        if exact and component == "decoder":  # as `OnnxWeights` does it
            without_int8_activations(model)
        outputs = {output for node in model.graph.node for output in node.output}
        names = {
            name: value
            for name in wanted
            if op_component(name) == component and (value := _value(name, outputs)) is not None
        }
        feeds = _feeds(component, given, manifest)
        if component == "vision":
            _run(path, *_with_rows(path, model, names, wanted), feeds, values.add_rows)
        else:
            for batch in _batches(names, wanted):
                _run(path, model, batch, feeds, values.add)


def encoder_integers(
    bundle: Path, manifest: Manifest, pixel_values: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What an encoder with integer activations rounds to, and its image tokens.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        pixel_values: What the graph takes: float32 [1, 3, S, S], or a picture of any size.

    Returns:
        Unsigned integers by the name of their value in the graph, and float32 [num_image_tokens, hidden].

    Raises:
        BundleError: ONNX Runtime refuses the graph.
    """
    path = bundle / manifest.artifact(_TARGET, "vision").files[0]
    with refusals(path):
        model = onnx.load(path, load_external_data=False)
    names = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = session_of(model, path)
    with refusals(path):
        features, *integers = session.run([IMAGE_FEATURES, *names], {PIXEL_VALUES: pixel_values})
    return dict(zip(names, integers, strict=True)), features


def _value(name: str, known: Collection[str]) -> str | None:
    """What the graph calls the result of an operation; None if it has none."""
    match = re.match(r"l(\d+)_(\w+)$", name)
    candidates = [name]
    if match:
        layer, part = int(match[1]), match[2]
        candidates += {
            "qkv": [f"{name}_biased"],
            # ONNX Runtime adds to the residual stream inside the norm that follows.
            "attn_residual": [f"{decoder_op(layer, 'mlp_norm')}_residual"],
            "residual": [f"{decoder_op(layer + 1, 'attn_norm')}_residual", "final_norm_residual"],
        }.get(part, [])
        if part == "qkv":
            candidates.reverse()  # the product without its bias has the operation's own name
    return next((value for value in candidates if value in known), None)


def _with_rows(
    path: Path, model: onnx.ModelProto, names: Mapping[str, str], wanted: Mapping[str, Wanted]
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A copy of a graph that also gives some rows of values, and how those are called.

    They are picked as soon as a value is there, so that it need not be kept: all are 3 GB at 1024 pixels.
    """
    copy, rows, after = onnx.ModelProto(), dict[str, str](), dict[str, list[onnx.NodeProto]]()
    copy.CopyFrom(model)
    for name, is_map in _maps(path, model, names).items():
        want, flat, found = wanted[name], f"{names[name]}/flat", f"{names[name]}/rows"
        shape = np.asarray([-1, want.num_rows] if is_map else [want.num_rows, -1], np.int64)
        constants = {f"{name}/shape": shape, f"{name}/positions": want.rows}
        copy.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in constants.items())
        nodes = [
            onnx.helper.make_node("Reshape", [names[name], f"{name}/shape"], [flat]),
            onnx.helper.make_node("Gather", [flat, f"{name}/positions"], [found], axis=1 if is_map else 0),
        ]
        if is_map:
            nodes.append(onnx.helper.make_node("Transpose", [found], [f"{found}/turned"], perm=[1, 0]))
        after.setdefault(names[name], []).extend(nodes)
        rows[name] = nodes[-1].output[0]
    del copy.graph.node[:]
    for node in model.graph.node:
        copy.graph.node.append(node)
        copy.graph.node.extend(added for output in node.output for added in after.get(output, ()))
    return copy, rows


def _maps(path: Path, model: onnx.ModelProto, names: Mapping[str, str]) -> dict[str, bool]:
    """Which values are maps, [1, C, H, W], and not rows; ONNX Runtime knows the shapes, the file does not."""
    session = session_of(_giving(model, names.values()), path, as_it_is=True)
    ranks = {value.name: len(value.shape) for value in session.get_outputs()}
    return {name: ranks[value] == _MAP_RANK for name, value in names.items()}


def _giving(model: onnx.ModelProto, values: Collection[str]) -> onnx.ModelProto:
    """A copy of a graph with other outputs: nothing is loaded or computed behind the last one."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=value) for value in dict.fromkeys(values))
    return copy


def _batches(names: Mapping[str, str], wanted: Mapping[str, Wanted]) -> Iterator[dict[str, str]]:
    """Values by operation, so many at once as memory should be taken for."""
    batch: dict[str, str] = {}
    for name, value in names.items():
        if batch and sum(wanted[n].num_bytes for n in (*batch, name)) > _AT_ONCE:
            yield batch
            batch = {}
        batch[name] = value
    if batch:
        yield batch


def _run(
    path: Path,
    model: onnx.ModelProto,
    names: Mapping[str, str],
    feeds: Mapping[str, np.ndarray],
    on_value: _OnValue,
) -> None:
    session: onnxruntime.InferenceSession = session_of(_giving(model, names.values()), path, in_order=True)
    with refusals(path):
        results = session.run(list(names.values()), dict(feeds))
    for name in reversed(list(names)):  # each is released when it was seen
        on_value(name, np.asarray(results.pop()))


def _feeds(component: Component, given: np.ndarray, manifest: Manifest) -> dict[str, np.ndarray]:
    """Inputs of a graph; the decoder's cache is empty."""
    if component == "vision":
        return {PIXEL_VALUES: given}
    feeds = {INPUTS_EMBEDS: given[None], ATTENTION_MASK: np.ones((1, len(given)), np.int64)}
    for spec in manifest.artifact(_TARGET, "decoder").inputs:
        if spec.name not in feeds:
            feeds[spec.name] = np.zeros((1, int(spec.shape[1]), 0, int(spec.shape[3])), spec.dtype)
    return feeds
