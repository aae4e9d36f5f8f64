"""An ONNX bundle as a session, executed by ONNX Runtime: weights that many share, and a sequence of one."""

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime

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
    Precision,
)
from fastvlm_convert.manifest import Manifest, takes_pictures
from fastvlm_convert.runtime.onnx_contract import check_manifest
from fastvlm_convert.runtime.onnx_graphs import TARGET, load_exact, load_front, load_graph, refusals
from fastvlm_convert.runtime.threads import DEFAULT_THREADS, Threads
from fastvlm_convert.session import KvPrefix

EXECUTED_BY: Final = f"onnxruntime {onnxruntime.__version__}"


class OnnxWeights:
    """The graphs of a bundle, loaded once; any number of threads may use them at a time.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        exact: Whether quantized matrices multiply float activations; slower by far, and as exact as the file.
        threads: How many compute one operation.
        in_turn: Load the encoder alone, and the rest when it is needed; the encoder is released before that.

    Raises:
        BundleError: ONNX Runtime refuses a graph, here or when it is run.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        exact: bool = False,
        threads: Threads = DEFAULT_THREADS,
        in_turn: bool = False,
    ) -> None:
        self.executed_by = f"{EXECUTED_BY} (float activations)" if exact else EXECUTED_BY
        self.context_length = manifest.contract.context_length
        self.num_image_tokens = manifest.contract.num_image_tokens
        self._load = partial(load_graph, bundle, manifest, threads=threads)
        self._load_decoder = partial(load_exact, bundle, manifest, threads=threads) if exact else self._load
        self._in_turn = in_turn
        vision = manifest.artifact(TARGET, "vision")
        self._vision_path, self._takes_pictures = bundle / vision.files[0], takes_pictures(vision)
        decoder = manifest.artifact(TARGET, "decoder")
        self.past = [t for t in decoder.inputs if t.name not in (INPUTS_EMBEDS, ATTENTION_MASK)]
        self.present = [t.name for t in decoder.outputs if t.name != LOGITS]
        self.vocabulary = int(next(t.shape[-1] for t in decoder.outputs if t.name == LOGITS))
        if not exact:  # else only the decoder is another one, and pictures may be known
            _ = self._vision
        if not in_turn:
            _ = self._embed, self.decoder

    @cached_property
    def _vision(self) -> onnxruntime.InferenceSession:
        return self._load("vision")

    @cached_property
    def _embed(self) -> onnxruntime.InferenceSession:
        return self._load("embed")

    @cached_property
    def decoder(self) -> onnxruntime.InferenceSession:
        """The decoder's graph."""
        if self._in_turn:
            vars(self).pop("_vision", None)
        return self._load_decoder("decoder")

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S], or pictures of any size -> float32 [num_image_tokens, hidden]."""
        with refusals("vision"):
            return np.asarray(self._vision.run([IMAGE_FEATURES], {PIXEL_VALUES: pixel_values})[0])

    def prepare(self, pictures: np.ndarray) -> np.ndarray:
        """What the encoder gets: the same, or what the graph makes of float32 [1, 3, height, width]."""
        if not self._takes_pictures:
            return pictures
        with refusals("vision"):
            return np.asarray(self._front.run([PREPARED_PIXELS], {PIXEL_VALUES: pictures})[0])

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """int64 [n] -> float32 [n, hidden]."""
        with refusals("embed"):
            return np.asarray(self._embed.run([INPUTS_EMBEDS], {INPUT_IDS: token_ids[None]})[0][0])

    @cached_property
    def _front(self) -> onnxruntime.InferenceSession:
        """Threads that ask for it at once may each load one, and all are the same."""
        return load_front(self._vision_path)


class OnnxSequence:
    """One request: a KV cache over shared weights; implements `session.Session` and `ReusesPrefixes`.

    The KV cache is one fixed buffer a tensor, bound as past and as present: attention writes new positions
    in place and nothing is copied between steps. A sequence is for one thread at a time.

    Args:
        weights: What computes.
    """

    trouble: str | None = None  # ONNX Runtime does not say where a value came from

    def __init__(self, weights: OnnxWeights) -> None:
        self.weights = weights
        self.executed_by = weights.executed_by
        self.context_length = weights.context_length
        self.num_image_tokens = weights.num_image_tokens
        self._length = 0
        self._cache = [
            np.zeros((1, int(t.shape[1]), self.context_length, int(t.shape[3])), t.dtype)
            for t in weights.past
        ]
        self._logits = np.zeros((1, 1, weights.vocabulary), np.float32)
        self._ones = np.ones((1, self.context_length), np.int64)

    @cached_property
    def _binding(self) -> onnxruntime.IOBinding:
        """Bound once: what ONNX Runtime reads and writes is the memory of these arrays."""
        binding = self.weights.decoder.io_binding()
        names = zip(self.weights.past, self.weights.present, self._cache, strict=True)
        with refusals("decoder"):
            for past, present, array in names:
                value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
                binding.bind_ortvalue_input(past.name, value)
                binding.bind_ortvalue_output(present, value)
            binding.bind_ortvalue_output(LOGITS, onnxruntime.OrtValue.ortvalue_from_numpy(self._logits))
        return binding

    def another(self) -> "OnnxSequence":
        """A new sequence over the same weights, for another request."""
        return OnnxSequence(self.weights)

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S], or pictures of any size -> float32 [num_image_tokens, hidden]."""
        return self.weights.encode_image(pixel_values)

    def prepare(self, pictures: np.ndarray) -> np.ndarray:
        """What the encoder gets: the same, or what the graph makes of float32 [1, 3, height, width]."""
        return self.weights.prepare(pictures)

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """int64 [n] -> float32 [n, hidden]."""
        return self.weights.embed(token_ids)

    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Start a new sequence; logits of the last position, float32 [vocab]."""
        self._length = 0
        return self.append(inputs_embeds)

    def decode(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Append one token; its logits, float32 [vocab]."""
        return self.append(inputs_embeds)

    def extend(self, inputs_embeds: np.ndarray, position: int) -> np.ndarray:
        """Append tokens from a position on; keys and values that are skipped are zero."""
        for values in self._cache:
            values[:, :, self._length : position] = 0  # an earlier sequence may have been longer
        self._length = position
        return self.append(inputs_embeds)

    def copy_prefix(self, length: int, start: int = 0) -> KvPrefix:
        """Copies of the positions of this sequence from `start` to before `length`.

        Raises:
            ValueError: It has no such positions.
        """
        if not 0 <= start <= length <= self._length:
            raise ValueError(f"positions {start} to {length} of a sequence of {self._length}")
        return KvPrefix(start, length, tuple(values[0, :, start:length].copy() for values in self._cache))

    def start_from(self, prefixes: Sequence[KvPrefix]) -> None:
        """Begin a new sequence with prefixes, the first of which starts at 0 and each next where one stops.

        Raises:
            ValueError: They do not follow each other like that.
        """
        length = 0
        for prefix in prefixes:
            if prefix.start != length:
                raise ValueError(f"a prefix from {prefix.start} on, behind one of {length} positions")
            for values, known in zip(self._cache, prefix.values, strict=True):
                values[0, :, prefix.start : prefix.stop] = known
            length = prefix.stop
        self._length = length

    def append(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Append float32 [n, hidden]; logits of the last position, float32 [vocab].

        Raises:
            BundleError: The cache cannot hold them, or ONNX Runtime refuses the graph.
        """
        length = self._length + len(inputs_embeds)
        if length > self.context_length:
            raise BundleError(
                f"a sequence of {length} tokens exceeds the context of {self.context_length}",
                hint="export with a larger max_context_length",
            )
        given = np.ascontiguousarray(inputs_embeds[None], np.float32)
        # As long as the sequence really is, not as the buffer: its sum and length tell the positions.
        mask = self._ones[:, :length]
        with refusals("decoder"):
            for name, array in ((INPUTS_EMBEDS, given), (ATTENTION_MASK, mask)):
                self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            self.weights.decoder.run_with_iobinding(self._binding)
        self._length = length
        return self._logits[0, 0].copy()


def open_session(
    bundle: Path, manifest: Manifest, precision: Precision | None, threads: Threads, in_turn: bool
) -> OnnxSequence:
    """Run the graphs of a bundle.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        precision: `exact` does without int8 activations; anything else runs the graphs as they are.
        threads: How many compute one operation.
        in_turn: See `OnnxWeights`.

    Raises:
        BundleError: The manifest lists other artifacts than the session runs, or ONNX Runtime refuses one.
    """
    check_manifest(manifest)
    return OnnxSequence(OnnxWeights(bundle, manifest, precision == "exact", threads, in_turn))


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
    session = load_graph(bundle, manifest, "embed", MAIN if image_features is None else MERGE)
    with refusals("embed"):
        return np.asarray(session.run([INPUTS_EMBEDS], given)[0][0])
