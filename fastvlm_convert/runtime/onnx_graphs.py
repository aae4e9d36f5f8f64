"""The graphs of an ONNX bundle, loaded by ONNX Runtime."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as _native

from fastvlm_convert.errors import BundleError
from fastvlm_convert.heap import large_blocks_returned
from fastvlm_convert.io_names import MAIN, PREPARED_PIXELS, Component, TensorSpec
from fastvlm_convert.manifest import Artifact, Manifest
from fastvlm_convert.runtime.contract import check_graph
from fastvlm_convert.runtime.threads import DEFAULT_THREADS, Threads

if TYPE_CHECKING:
    import onnx

TARGET: Final = "onnx"

# ONNX Runtime's errors have no common base, and a run with bound buffers raises Python's own.
_NATIVE = [e for e in vars(_native).values() if isinstance(e, type) and issubclass(e, Exception)]
# A TypeError is how pybind11 refuses a path that is no UTF-8, a DecodeError how protobuf refuses a file.
_ERRORS: tuple[type[Exception], ...] = (RuntimeError, TypeError, DecodeError, *_NATIVE)
_SEVERITY = 4  # ONNX Runtime logs nothing but fatal errors; it raises the others, which is enough


def load_graph(
    bundle: Path,
    manifest: Manifest,
    component: Component,
    function: str = MAIN,
    threads: Threads = DEFAULT_THREADS,
) -> onnxruntime.InferenceSession:
    """A graph of a bundle.

    Raises:
        BundleError: ONNX Runtime refuses it, or it is not the one that the manifest lists.
    """
    artifact = manifest.artifact(TARGET, component, function)
    path = bundle / artifact.files[0]
    options = _options(threads)
    # The arena would keep the encoder's activations, 0.3 GiB, for the next picture, and saves no time.
    options.enable_cpu_mem_arena = component != "vision"
    return _checked(_session(path, path, options), artifact)


def load_exact(
    bundle: Path, manifest: Manifest, component: Component, threads: Threads = DEFAULT_THREADS
) -> onnxruntime.InferenceSession:
    """A copy of the graph, in memory, whose MatMulNBits do not round activations to int8.

    Raises:
        BundleError: See `load_graph`.
    """
    import onnx

    artifact = manifest.artifact(TARGET, component)
    path = bundle / artifact.files[0]
    with refusals(path):
        model = onnx.load(path, load_external_data=False)
    without_int8_activations(model)
    session = session_of(model, path, threads)
    return _checked(session, artifact)


def without_int8_activations(model: "onnx.ModelProto") -> None:
    """Let a graph's MatMulNBits multiply floats."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0


def session_of(
    model: "onnx.ModelProto",
    path: Path,
    threads: Threads = DEFAULT_THREADS,
    in_order: bool = False,
    as_it_is: bool = False,
) -> onnxruntime.InferenceSession:
    """A session of a graph in memory, whose weights lie beside a file.

    Args:
        model: The graph.
        path: The file.
        threads: That run it.
        in_order: Run what stands first as soon as it can be run, and keep no memory for the next run. Else
            ONNX Runtime goes by depth, and what reads a value for an output of its own comes last.
        as_it_is: Fold, fuse and pack nothing: quick to load, slow to run.

    Raises:
        BundleError: ONNX Runtime refuses it.
    """
    options = _options(threads)
    if as_it_is:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    if in_order:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        # Blocked convolutions would turn values back at the very end, and keep all of them until then.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return _session(model.SerializeToString(), path, options)


def _session(
    graph: Path | bytes, path: Path, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    with refusals(path), large_blocks_returned():
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _options(threads: Threads) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SEVERITY
    # As torch and NumPy do it; ONNX Runtime itself would start a thread for every core.
    stated = os.environ.get("OMP_NUM_THREADS", "")
    if threads.count is not None:
        options.intra_op_num_threads = threads.count
    elif stated.isdecimal():
        options.intra_op_num_threads = int(stated)
    if not threads.spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def load_front(path: Path) -> onnxruntime.InferenceSession:
    """The part of a vision graph that prepares pictures; it has no weights.

    Raises:
        BundleError: The file is no graph.
    """
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
        return onnxruntime.InferenceSession(
            front.SerializeToString(), _options(DEFAULT_THREADS), providers=["CPUExecutionProvider"]
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
