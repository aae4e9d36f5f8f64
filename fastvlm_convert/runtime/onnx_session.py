"""An ONNX bundle as a session, executed by ONNX Runtime."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as _native

from fastvlm_convert.errors import BundleError
from fastvlm_convert.io_names import (
    ATTENTION_MASK,
    IMAGE_FEATURES,
    INPUT_IDS,
    INPUTS_EMBEDS,
    LOGITS,
    MAIN,
    MERGE,
    PIXEL_VALUES,
    PREPARED_PIXELS,
    Component,
    Precision,
    TensorSpec,
)
from fastvlm_convert.manifest import Artifact, Manifest, takes_pictures
from fastvlm_convert.runtime.contract import check_graph
from fastvlm_convert.runtime.onnx_contract import check_manifest

if TYPE_CHECKING:
    import onnx

EXECUTED_BY: Final = f"onnxruntime {onnxruntime.__version__}"
_TARGET: Final = "onnx"

# ONNX Runtime's errors have no common base, and a run with bound buffers raises Python's own.
_NATIVE = [e for e in vars(_native).values() if isinstance(e, type) and issubclass(e, Exception)]
# A TypeError is how pybind11 refuses a path that is no UTF-8, a DecodeError how protobuf refuses a file.
_ERRORS: tuple[type[Exception], ...] = (RuntimeError, TypeError, DecodeError, *_NATIVE)
_SEVERITY = 4  # ONNX Runtime logs nothing but fatal errors; it raises the others, which is enough


class OnnxSession:
    """Runs the three graphs of a bundle; implements `decode.Session`.

    The KV cache is one fixed buffer a tensor, bound as past and as present: attention writes new positions
    in place and nothing is copied between steps.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        exact: Whether quantized matrices multiply float activations; slower by far, and as exact as the file.

    Raises:
        BundleError: ONNX Runtime refuses a graph, here or when it is run.
    """

    trouble: str | None = None  # ONNX Runtime does not say where a value came from

    def __init__(self, bundle: Path, manifest: Manifest, exact: bool = False) -> None:
        self.executed_by = f"{EXECUTED_BY} (float activations)" if exact else EXECUTED_BY
        self.context_length = manifest.contract.context_length
        self.num_image_tokens = manifest.contract.num_image_tokens
        self._vision = _load(bundle, manifest, "vision")
        vision = manifest.artifact(_TARGET, "vision")
        self._vision_path, self._takes_pictures = bundle / vision.files[0], takes_pictures(vision)
        self._front: onnxruntime.InferenceSession | None = None
        self._embed = _load(bundle, manifest, "embed")
        self._decoder = (_load_exact if exact else _load)(bundle, manifest, "decoder")
        decoder = manifest.artifact(_TARGET, "decoder")
        past = [t for t in decoder.inputs if t.name not in (INPUTS_EMBEDS, ATTENTION_MASK)]
        present = [t.name for t in decoder.outputs if t.name != LOGITS]
        self._cache = [
            (spec.name, output, self._buffer(spec.shape, spec.dtype))
            for spec, output in zip(past, present, strict=True)
        ]
        self._length = 0

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S], or pictures of any size -> float32 [num_image_tokens, hidden]."""
        with refusals("vision"):
            return np.asarray(self._vision.run([IMAGE_FEATURES], {PIXEL_VALUES: pixel_values})[0])

    def prepare(self, pictures: np.ndarray) -> np.ndarray:
        """What the encoder gets: the same, or what the graph makes of float32 [1, 3, height, width]."""
        if self._takes_pictures and self._front is None:
            self._front = _load_front(self._vision_path)
        if self._front is None:
            return pictures
        with refusals("vision"):
            return np.asarray(self._front.run([PREPARED_PIXELS], {PIXEL_VALUES: pictures})[0])

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """int64 [n] -> float32 [n, hidden]."""
        with refusals("embed"):
            return np.asarray(self._embed.run([INPUTS_EMBEDS], {INPUT_IDS: token_ids[None]})[0][0])

    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Start a new sequence; logits of the last position, float32 [vocab]."""
        self._length = 0
        return self._append(inputs_embeds)

    def decode(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Append one token; its logits, float32 [vocab]."""
        return self._append(inputs_embeds)

    def extend(self, inputs_embeds: np.ndarray, position: int) -> np.ndarray:
        """Append tokens from a position on; keys and values that are skipped are zero."""
        for _, _, buffer in self._cache:
            values = np.array(buffer.numpy())
            values[:, :, self._length : position] = 0  # an earlier sequence may have been longer
            buffer.update_inplace(values)
        self._length = position
        return self._append(inputs_embeds)

    def _append(self, inputs_embeds: np.ndarray) -> np.ndarray:
        length = self._length + len(inputs_embeds)
        binding = self._decoder.io_binding()
        binding.bind_cpu_input(INPUTS_EMBEDS, np.ascontiguousarray(inputs_embeds[None]))
        # As long as the sequence really is, not as the buffer: its sum and length tell the positions.
        binding.bind_cpu_input(ATTENTION_MASK, np.ones((1, length), np.int64))
        binding.bind_output(LOGITS)
        for past, present, buffer in self._cache:
            binding.bind_ortvalue_input(past, buffer)
            binding.bind_ortvalue_output(present, buffer)
        with refusals("decoder"):
            self._decoder.run_with_iobinding(binding)
        self._length = length
        return np.asarray(binding.get_outputs()[0].numpy()[0, -1])

    def _buffer(self, shape: tuple[int | str, ...], dtype: str) -> onnxruntime.OrtValue:
        heads, head_dim = int(shape[1]), int(shape[3])
        return onnxruntime.OrtValue.ortvalue_from_numpy(
            np.zeros((1, heads, self.context_length, head_dim), dtype)
        )


def open_session(bundle: Path, manifest: Manifest, precision: Precision | None) -> OnnxSession:
    """Run the graphs of a bundle.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        precision: `exact` does without int8 activations; anything else runs the graphs as they are.

    Raises:
        BundleError: The manifest lists other artifacts than the session runs, or ONNX Runtime refuses one.
    """
    check_manifest(manifest)
    return OnnxSession(bundle, manifest, exact=precision == "exact")


def embed_apart(
    bundle: Path, manifest: Manifest, token_ids: np.ndarray, image_features: np.ndarray | None = None
) -> np.ndarray:
    """Embed a prompt with nothing loaded but the graph for it.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        token_ids: int64 [n], with the id of `<image>` where features go.
        image_features: float32 [num_image_tokens, hidden], for the graph that merges; None looks ids up.

    Returns:
        float32 [n, hidden].

    Raises:
        BundleError: There is no such graph, the manifest lists another one, or ONNX Runtime refuses it.
    """
    check_manifest(manifest)
    given = {INPUT_IDS: token_ids[None]}
    if image_features is not None:
        given[IMAGE_FEATURES] = image_features
    session = _load(bundle, manifest, "embed", MAIN if image_features is None else MERGE)
    with refusals("embed"):
        return np.asarray(session.run([INPUTS_EMBEDS], given)[0][0])


def _load(
    bundle: Path, manifest: Manifest, component: Component, function: str = MAIN
) -> onnxruntime.InferenceSession:
    artifact = manifest.artifact(_TARGET, component, function)
    path = bundle / artifact.files[0]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SEVERITY
    with refusals(path):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return _checked(session, artifact)


def _load_exact(bundle: Path, manifest: Manifest, component: Component) -> onnxruntime.InferenceSession:
    """A copy of the graph, in memory, whose MatMulNBits do not round activations to int8."""
    import onnx

    artifact = manifest.artifact(_TARGET, component)
    path = bundle / artifact.files[0]
    with refusals(path):
        model = onnx.load(path, load_external_data=False)
    without_int8_activations(model)
    session = session_of(model, path)
    return _checked(session, artifact)


def without_int8_activations(model: "onnx.ModelProto") -> None:
    """Let a graph's MatMulNBits multiply floats."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0


def session_of(model: "onnx.ModelProto", path: Path) -> onnxruntime.InferenceSession:
    """A session of a graph in memory, whose weights lie beside a file.

    Raises:
        BundleError: ONNX Runtime refuses it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SEVERITY
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    with refusals(path):
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def _load_front(path: Path) -> onnxruntime.InferenceSession:
    """The part of a vision graph that prepares pictures; it has no weights."""
    import onnx

    with refusals(path):
        model = onnx.load(path, load_external_data=False)
        names = [node.output[0] for node in model.graph.node]
        nodes = model.graph.node[: names.index(PREPARED_PIXELS) + 1 if PREPARED_PIXELS in names else 0]
        read = {name for node in nodes for name in node.input}
        graph = onnx.helper.make_graph(
            nodes,
            "front",
            model.graph.input,
            [onnx.helper.make_tensor_value_info(PREPARED_PIXELS, onnx.TensorProto.FLOAT, None)],
            [tensor for tensor in model.graph.initializer if tensor.name in read],
        )
        front = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SEVERITY
        return onnxruntime.InferenceSession(
            front.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def _checked(session: onnxruntime.InferenceSession, artifact: Artifact) -> onnxruntime.InferenceSession:
    """A session whose graph is the one that the manifest describes."""
    for what, listed, found in (
        ("inputs", artifact.inputs, session.get_inputs()),
        ("outputs", artifact.outputs, session.get_outputs()),
    ):
        specs = [TensorSpec(value.name, _dtype(value.type), tuple(value.shape)) for value in found]
        check_graph(f"the {what} of {artifact.files[0]}", listed, specs)
    return session


def _dtype(kind: str) -> str:
    """`tensor(float16)` -> `float16`."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return "float32" if name == "float" else name


@contextmanager
def refusals(where: object) -> Iterator[None]:
    """Turn ONNX Runtime's errors into ours.

    Raises:
        BundleError: It raised one.
    """
    try:
        yield
    except _ERRORS as error:
        raise BundleError(
            f"ONNX Runtime refuses the graph: {' '.join(str(error).split())}",
            where=where,
            hint="`fastvlm-convert verify` tells whether files were changed; or export the bundle again",
        ) from error
