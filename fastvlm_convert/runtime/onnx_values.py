"""What the operations of a bundle's ONNX graphs give: copies in memory whose values are outputs.

ONNX Runtime fuses fewer operations where it must hand out what lies between them, so the last bits may differ
from those of the graph as it is shipped.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

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
_AT_ONCE: Final = 512 << 20  # bytes of values that one run hands out

OnValue = Callable[[str, np.ndarray], None]


def onnx_values(
    bundle: Path,
    manifest: Manifest,
    inputs: Mapping[Component, np.ndarray],
    num_bytes: Mapping[str, int],
    on_value: OnValue,
    *,
    exact: bool,
) -> None:
    """Run the encoder and the decoder, and report what their operations give.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        inputs: Of `vision` pixel values, float32 [1, 3, S, S]; of `decoder` embeddings of a prompt, float32
            [n, hidden]. What is not there is not run.
        num_bytes: Operations to report, and the bytes of their results.
        on_value: Called with the name of an operation and its result.
        exact: Whether quantized matrices multiply float activations.

    Raises:
        BundleError: ONNX Runtime refuses a graph.
    """
    for component, given in inputs.items():
        path = bundle / manifest.artifact(_TARGET, component).files[0]
        with refusals(path):
            model = onnx.load(path, load_external_data=False)
        if exact:
            without_int8_activations(model)
        values = {output for node in model.graph.node for output in node.output}
        names = {
            name: value
            for name in num_bytes
            if op_component(name) == component and (value := _value(name, values)) is not None
        }
        for batch in _batches(names, num_bytes):
            _run(path, model, batch, _feeds(component, given, manifest), on_value)


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


def _batches(names: Mapping[str, str], num_bytes: Mapping[str, int]) -> Iterator[dict[str, str]]:
    """Values by operation, so many at once as memory should be taken for."""
    batch: dict[str, str] = {}
    for name, value in names.items():
        if batch and sum(num_bytes[n] for n in (*batch, name)) > _AT_ONCE:
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
    on_value: OnValue,
) -> None:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    # Without its own outputs nothing is loaded or computed behind the last value that is asked for.
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=value) for value in dict.fromkeys(names.values()))
    session: onnxruntime.InferenceSession = session_of(copy, path)
    with refusals(path):
        results = session.run(list(names.values()), dict(feeds))
    for name, result in zip(names, results, strict=True):
        on_value(name, np.asarray(result))


def _feeds(component: Component, given: np.ndarray, manifest: Manifest) -> dict[str, np.ndarray]:
    """Inputs of a graph; the decoder's cache is empty."""
    if component == "vision":
        return {PIXEL_VALUES: given}
    feeds = {INPUTS_EMBEDS: given[None], ATTENTION_MASK: np.ones((1, len(given)), np.int64)}
    for spec in manifest.artifact(_TARGET, "decoder").inputs:
        if spec.name not in feeds:
            feeds[spec.name] = np.zeros((1, int(spec.shape[1]), 0, int(spec.shape[3])), spec.dtype)
    return feeds
