"""A Core ML bundle as a session: executed by Core ML on a Mac, by our interpreter anywhere."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from fastvlm_convert.errors import BundleError, shortened
from fastvlm_convert.io_names import (
    DECODE,
    EMBED,
    HIDDEN_STATES,
    HIDDEN_STATES_OUT,
    IMAGE,
    IMAGE_FEATURES,
    INPUT_IDS,
    INPUTS_EMBEDS,
    KEY_CACHE,
    KEY_CACHE_OUT,
    LAST_INDEX,
    LOGITS,
    POSITION,
    PREFILL,
    VALUE_CACHE,
    VALUE_CACHE_OUT,
    Precision,
)
from fastvlm_convert.manifest import Artifact, Manifest
from fastvlm_convert.mil import Interpreter, OpResult, State
from fastvlm_convert.preprocess import picture_of
from fastvlm_convert.runtime.contract import AGAIN
from fastvlm_convert.runtime.core_ml import has_core_ml
from fastvlm_convert.runtime.coreml_contract import chain, check_manifest
from fastvlm_convert.runtime.threads import Threads, refuse_threads

_TARGET: Final = "coreml"


class Runner(Protocol):
    """Runs the functions of one package.

    Attributes:
        executed_by: What executes it.
        trouble: The operation that first gave NaN or infinity, in words, or None.
    """

    executed_by: str
    trouble: str | None

    def run(self, function: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run a function; states persist until `reset`."""
        ...

    def reset(self) -> None:
        """Set all states to zero."""
        ...


class InterpretedPackage:
    """A package run by the interpreter. It proves program and weights, not Apple's kernels.

    Args:
        path: The package.
        precision: `exact` computes in float32, `device` rounds to what the program declares after every step.

    Attributes:
        on_op: Called with what each operation gave.
    """

    def __init__(self, path: Path, precision: Precision) -> None:
        self._path = path
        self.executed_by = f"interpreter ({precision})"
        self.interpreter = Interpreter(path, precision)
        self.trouble: str | None = None
        self.on_op: Callable[[OpResult], None] | None = None
        self._state: State | None = None

    def run(self, function: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run a function; states persist until `reset`."""
        if function not in self.interpreter.functions:
            there = shortened(", ".join(self.interpreter.functions), 100)
            raise BundleError(
                f"the package has no function '{function}', but {there}", where=self._path, hint=AGAIN
            )
        has_state = bool(self.interpreter.functions[function].states)
        if has_state and self._state is None:
            self._state = self.interpreter.make_state(function)
        outputs = self.interpreter.predict(
            dict(inputs), self._state if has_state else None, function, self.on_op
        )
        for found in self.interpreter.nonfinite:
            self.trouble = (
                self.trouble or f"{found.kind} first at '{found.name}' ({found.type}) of {function}"
            )
        return outputs

    def reset(self) -> None:
        """Set all states to zero."""
        if self._state is not None:
            self._state.reset()


class CoreMLSession:
    """Runs the vision and decoder packages of a bundle; implements `session.Session`.

    Args:
        manifest: The bundle's manifest, checked.
        vision: The encoder.
        decoder: The packages of the decoder in the order in which they run.
    """

    def __init__(self, manifest: Manifest, vision: Runner, decoder: Sequence[Runner]) -> None:
        self.executed_by = vision.executed_by
        self.context_length = manifest.contract.context_length
        self.num_image_tokens = manifest.contract.num_image_tokens
        self._vision = vision
        self._decoder = tuple(decoder)
        self._decode = chain(manifest, DECODE)
        packages = {step.files: package for step, package in zip(self._decode, self._decoder, strict=True)}
        self._embedder = packages.get(manifest.artifact(_TARGET, "embed").files, self._decoder[0])
        self._prefill = chain(manifest, PREFILL) or self._decode
        self._vision_artifact = manifest.artifact(_TARGET, "vision")
        self._images = manifest.contract.images
        self._chunk = manifest.recipe.coreml.prefill_chunk
        self._pads = manifest.recipe.coreml.sequence_lengths != "range"
        self._length = 0
        self._caches: list[dict[str, np.ndarray]] = []

    @property
    def packages(self) -> tuple[Runner, ...]:
        """What runs the encoder and the decoder."""
        return self._vision, *self._decoder

    @property
    def trouble(self) -> str | None:
        """The operation that first gave NaN or infinity, in words, or None."""
        return next((package.trouble for package in self.packages if package.trouble), None)

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] -> float32 [num_image_tokens, hidden]."""
        name = self._vision_artifact.inputs[0].name
        value: Any = picture_of(pixel_values, self._images) if name == IMAGE else pixel_values
        outputs = self._vision.run(self._vision_artifact.function, {name: value})
        return _output(outputs, IMAGE_FEATURES, 3)[0].astype(np.float32)

    def prepare(self, pictures: np.ndarray) -> np.ndarray:
        """The same: pictures come prepared."""
        return pictures

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """int64 [n] -> float32 [n, hidden]."""
        ids = token_ids.astype(np.int32)[None]
        parts = [
            _output(
                self._embedder.run(EMBED, {INPUT_IDS: ids[:, start : start + self._chunk]}),
                INPUTS_EMBEDS,
                3,
            )[0]
            for start in range(0, ids.shape[1], self._chunk)
        ]
        return np.concatenate(parts).astype(np.float32)

    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Start a new sequence; logits of the last position, float32 [vocab]."""
        self._length = 0
        for package in self._decoder:
            package.reset()
        self._caches = [_empty_caches(function) for function in self._decode]
        return self.extend(inputs_embeds, 0)

    def extend(self, inputs_embeds: np.ndarray, position: int) -> np.ndarray:
        """Append tokens from a multiple of the chunk on; what is skipped is zero, as `prefill` left it."""
        self._length = position
        logits = np.zeros(0, np.float32)
        for start in range(0, len(inputs_embeds), self._chunk):
            logits = self._step(self._prefill, inputs_embeds[start : start + self._chunk])
        return logits

    def decode(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Append one token; its logits, float32 [vocab]."""
        return self._step(self._decode, inputs_embeds)

    def _step(self, functions: Sequence[Artifact], embeds: np.ndarray) -> np.ndarray:
        """Run a chain of functions on the embeddings of some tokens."""
        count = len(embeds)
        common = {POSITION: np.array([self._length], np.int32)}
        last = functions[-1]
        takes_last_index = any(spec.name == LAST_INDEX for spec in last.inputs)
        if takes_last_index:
            takes_one = last.function == DECODE  # an enumerated decode takes one token or a chunk
            if self._pads and not (takes_one and count == 1):
                # Rows after the last real one are ignored here and overwritten in the cache later.
                embeds = np.pad(embeds, ((0, self._chunk - count), (0, 0)))
        hidden, given = embeds[None], INPUTS_EMBEDS
        for i, (function, package) in enumerate(zip(functions, self._decoder, strict=True)):
            inputs: dict[str, Any] = {given: hidden, **common, **self._caches[i]}
            if function is last and takes_last_index:
                inputs[LAST_INDEX] = np.array([count - 1], np.int32)
            outputs = package.run(function.function, inputs)
            if self._caches[i]:
                self._caches[i] = {
                    KEY_CACHE: _output(outputs, KEY_CACHE_OUT, 4),
                    VALUE_CACHE: _output(outputs, VALUE_CACHE_OUT, 4),
                }
            if function is not last:
                hidden, given = _output(outputs, HIDDEN_STATES_OUT, 3), HIDDEN_STATES
        self._length += count
        return _output(outputs, LOGITS, 3)[0, 0].astype(np.float32)


def _empty_caches(function: Artifact) -> dict[str, np.ndarray]:
    """The cache where it is passed in and out; nothing where it is state."""
    return {
        spec.name: np.zeros([int(n) for n in spec.shape], spec.dtype)
        for spec in function.inputs
        if spec.name in (KEY_CACHE, VALUE_CACHE) and not spec.dtype.endswith("_state")
    }


def open_session(
    bundle: Path, manifest: Manifest, precision: Precision | None, threads: Threads, in_turn: bool
) -> CoreMLSession:
    """Run the packages of a bundle.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        precision: How the interpreter runs them; None leaves them to Core ML where there is one, and else
            means `exact`.
        threads: Must be left to the runtime.
        in_turn: Changes nothing: the runtime reads the files as it needs them.

    Raises:
        BundleError: The manifest lists other artifacts than the session runs, or a package is missing,
            damaged or refused.
        MissingDependencyError: A library is not installed.
    """
    del in_turn
    refuse_threads(_TARGET, threads)
    check_manifest(manifest)
    vision, *decoder = (
        (bundle / artifact.files[0]).parent
        for artifact in (manifest.artifact(_TARGET, "vision"), *chain(manifest, DECODE))
    )
    if precision is None and has_core_ml():
        from fastvlm_convert.runtime.coreml_package import CoreMLPackage

        return CoreMLSession(manifest, CoreMLPackage(vision), [CoreMLPackage(path) for path in decoder])
    chosen = precision or "exact"
    return CoreMLSession(
        manifest, InterpretedPackage(vision, chosen), [InterpretedPackage(path, chosen) for path in decoder]
    )


def _output(outputs: Mapping[str, np.ndarray], name: str, axes: int) -> np.ndarray:
    """An output that the manifest promises."""
    if name not in outputs or outputs[name].ndim != axes:
        there = shortened(", ".join(f"{n} of {v.ndim} axes" for n, v in outputs.items()), 100)
        raise BundleError(f"the package gives {there}, expected {name} of {axes} axes", hint=AGAIN)
    return outputs[name]
