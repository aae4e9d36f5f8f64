"""What an app must know of a bundle: one typed description, which every language's renderer writes out."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import NoneType
from typing import Annotated, Any, Final, get_args, get_type_hints

from fastvlm_convert.errors import BundleError, TargetError
from fastvlm_convert.io_names import (
    DECODE,
    IMAGE_FEATURES,
    KEY_CACHE,
    KEY_CACHE_OUT,
    LOGITS,
    PREFILL,
    VALUE_CACHE,
    VALUE_CACHE_OUT,
    TensorSpec,
    numbered,
    past_key,
    past_value,
    present_key,
    present_value,
)
from fastvlm_convert.manifest import Artifact, Manifest, takes_pictures
from fastvlm_convert.runtime import coreml_contract, onnx_contract
from fastvlm_convert.targets import Target

FREE: Final = -1  # a dimension that the caller chooses
_MAX_INT: Final = (1 << 31) - 1  # of Kotlin's and Java's Int


@dataclass(frozen=True)
class Tensor:
    """A graph's input or output; a dimension that the caller chooses is -1."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """One graph, or one function of a Core ML package.

    Attributes:
        path: What a runtime opens, relative to the bundle.
        files: Every file that it needs.
        function: Which function of a package it is.
        inputs: What it reads, states included.
        outputs: What it gives.
    """

    path: str
    files: tuple[str, ...]
    function: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class CacheLayout:
    """The tensors that hold keys and values between the steps.

    Attributes:
        shape: Of each, before the first step.
        dtype: `float32` or `float16`.
        is_state: Whether the runtime holds them itself.
        inputs: Their names going in.
        outputs: Their names coming out, in the same order; none for states.
    """

    shape: tuple[int, ...]
    dtype: str
    is_state: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class ClientContract:
    """Everything that an app must know of one target of a bundle; each field becomes a constant."""

    manifest_sha256: Annotated[
        str, "SHA-256 of fastvlm_manifest.json: which bundle these constants belong to."
    ]
    target: Annotated[str, "Format of the graphs."]
    image_in_graph: Annotated[
        bool,
        "Whether the vision graph takes pictures of any size, values divided by 255, and resizes them.",
    ]
    image_size: Annotated[int, "Edge of the square picture that the encoder takes, in pixels."]
    image_mode: Annotated[
        str, "How a picture is made square: pad (two sides are filled) or crop (the center)."
    ]
    image_resampling: Annotated[str, "Pillow's filter that resizes it."]
    image_ground: Annotated[tuple[int, ...], "Color that pad fills with: red, green, blue, 0 to 255."]
    rescale_factor: Annotated[float, "What 8-bit values are multiplied by, in double precision."]
    image_mean: Annotated[tuple[float, ...], "Subtracted from the rescaled values then, by channel."]
    image_std: Annotated[tuple[float, ...], "What they are divided by last, by channel."]
    num_image_tokens: Annotated[int, "Tokens that one picture becomes."]
    image_token: Annotated[str, "Placeholder of a picture in the prompt."]
    image_token_id: Annotated[int, "Its token id."]
    prompt: Annotated[str, "One picture and one question; {question} is where the user's text goes."]
    opening: Annotated[str, "What begins a conversation without a system message."]
    system_before: Annotated[str | None, "What stands before a system message, if the format has one."]
    system_after: Annotated[str | None, "What stands behind it."]
    user_before: Annotated[str, "What stands before a user's message."]
    user_after: Annotated[str, "What stands behind it."]
    assistant_before: Annotated[str, "What stands before an answer."]
    assistant_after: Annotated[str, "What stands behind it, in a conversation that goes on."]
    generation: Annotated[str, "What stands last and makes the model answer."]
    image_text: Annotated[str, "What a picture becomes: the placeholder and what follows it."]
    images_first: Annotated[
        bool, "Whether pictures come before the text of their message, wherever they stand."
    ]
    eos_token_ids: Annotated[tuple[int, ...], "Tokens at which an answer ends."]
    context_length: Annotated[int, "Tokens that the cache holds, prompt and answer together."]
    vocab_size: Annotated[int, "Number of logits."]
    hidden_size: Annotated[int, "Width of an embedding."]
    cache_shape: Annotated[tuple[int, ...], "Shape of each tensor of the cache before the first step."]
    cache_dtype: Annotated[str, "Their dtype: float32 or float16."]
    cache_is_state: Annotated[bool, "Whether the runtime holds the cache itself."]
    cache_inputs: Annotated[tuple[str, ...], "Names of the cache's tensors going in."]
    cache_outputs: Annotated[tuple[str, ...], "Names coming out, in the same order; none for states."]
    prefill_chunk: Annotated[int, "Most tokens that one call of embed or prefill takes; 0: any number."]
    pads_chunks: Annotated[bool, "Whether a shorter chunk must be padded to that number for prefill."]
    vision: Annotated[Graph, "The encoder with the projector."]
    embed: Annotated[Graph, "The embedding table."]
    decoder: Annotated[Graph, "The decoder; where there is a separate prefill, for one token."]
    prefill: Annotated[Graph | None, "The decoder for a chunk of a prompt, if it is a function of its own."]


@dataclass(frozen=True)
class Fact:
    """One constant.

    Attributes:
        name: In lower case, words joined by underscores.
        comment: What it is.
        type: Of its value, where there is one.
        value: The value; None where the bundle has none.
        is_optional: Whether another bundle's value may be None.
    """

    name: str
    comment: str
    type: Any
    value: Any
    is_optional: bool


def facts(contract: ClientContract) -> Iterator[Fact]:
    """A contract's constants in their order."""
    for name, hint in get_type_hints(ClientContract, include_extras=True).items():
        declared, comment = get_args(hint)
        choices = [kind for kind in get_args(declared) if kind is not NoneType]
        is_optional = NoneType in get_args(declared)
        yield Fact(
            name, comment, choices[0] if is_optional else declared, getattr(contract, name), is_optional
        )


def client_contract(manifest: Manifest, manifest_sha256: str, target: Target) -> ClientContract:
    """What an app must know to run one target of a bundle.

    Args:
        manifest: The bundle's manifest.
        manifest_sha256: Hash of its file.
        target: One that the bundle has.

    Raises:
        BundleError: The manifest does not describe what a session of ours could run.
        TargetError: Apps do not run this target with constants.
    """
    if target not in _TARGETS:
        raise TargetError(
            f"there are no constants for target '{target}'", hint=f"targets: {', '.join(_TARGETS)}"
        )
    kind = _TARGETS[target]
    kind.check(manifest)
    _check_whole(manifest, target)
    artifacts = {(a.component, a.function): a for a in manifest.artifacts if a.target == target}
    vision, embed = (manifest.artifact(target, part) for part in ("vision", "embed"))
    decoder = artifacts.get(("decoder", DECODE)) or manifest.artifact(target, "decoder")
    prefill = artifacts.get(("decoder", PREFILL))
    cache, (chunk, pads_chunks) = kind.cache(decoder), kind.chunks(manifest)
    contract, images, form = manifest.contract, manifest.contract.images, manifest.contract.conversation
    found = ClientContract(
        manifest_sha256=manifest_sha256,
        target=target,
        image_in_graph=takes_pictures(vision),
        image_size=images.size,
        image_mode=images.mode,
        image_resampling=images.resampling,
        image_ground=images.ground,
        rescale_factor=images.rescale_factor,
        image_mean=images.mean,
        image_std=images.std,
        num_image_tokens=contract.num_image_tokens,
        image_token=contract.image_token,
        image_token_id=contract.image_token_id,
        prompt=contract.prompt,
        **{name: getattr(form, name) for name in _FORM_TEXTS},
        image_text=form.image,
        eos_token_ids=contract.eos_token_ids,
        context_length=contract.context_length,
        vocab_size=_last_dimension(decoder.outputs, LOGITS),
        hidden_size=_last_dimension(vision.outputs, IMAGE_FEATURES),
        **{f"cache_{name}": value for name, value in vars(cache).items()},
        prefill_chunk=chunk,
        pads_chunks=pads_chunks,
        vision=_graph(vision),
        embed=_graph(embed),
        decoder=_graph(decoder),
        prefill=None if prefill is None else _graph(prefill),
    )
    _check_expressible(dataclasses.asdict(found))
    return found


def _check_whole(manifest: Manifest, target: Target) -> None:
    """See that the decoder is one package, as the examples load it."""
    if any(a.target == target and a.function == numbered(DECODE, 1) for a in manifest.artifacts):
        raise TargetError(
            "there are no constants for a decoder in several packages",
            hint="set coreml.split_larger_than_mb to never and export again; docs/coreml.md shows how an app "
            "runs several",
        )


_FORM_TEXTS: Final = (
    "opening", "system_before", "system_after", "user_before", "user_after", "assistant_before",
    "assistant_after", "generation", "images_first",
)  # fmt: skip


def _graph(artifact: Artifact) -> Graph:
    first = PurePosixPath(artifact.files[0])
    # A Core ML package is a folder, of which the manifest lists the files.
    is_package = first.parent.suffix == ".mlpackage"
    return Graph(
        path=str(first.parent if is_package else first),
        files=artifact.files,
        function=artifact.function,
        inputs=tuple(_tensor(spec) for spec in artifact.inputs),
        outputs=tuple(_tensor(spec) for spec in artifact.outputs),
    )


def _tensor(spec: TensorSpec) -> Tensor:
    return Tensor(spec.name, spec.dtype, tuple(FREE if isinstance(n, str) else n for n in spec.shape))


def _spec(specs: tuple[TensorSpec, ...], name: str) -> TensorSpec:
    return next(spec for spec in specs if spec.name == name)  # its target's check has seen that it is there


def _last_dimension(specs: tuple[TensorSpec, ...], name: str) -> int:
    return int(_spec(specs, name).shape[-1])


def _onnx_cache(decoder: Artifact) -> CacheLayout:
    layers = range((len(decoder.inputs) - 2) // 2)
    first = _spec(decoder.inputs, past_key(0))
    return CacheLayout(
        shape=(1, int(first.shape[1]), 0, int(first.shape[3])),
        dtype=first.dtype,
        is_state=False,
        inputs=tuple(name for i in layers for name in (past_key(i), past_value(i))),
        outputs=tuple(name for i in layers for name in (present_key(i), present_value(i))),
    )


def _coreml_cache(decoder: Artifact) -> CacheLayout:
    first = _spec(decoder.inputs, KEY_CACHE)
    dtype = first.dtype.removesuffix("_state")
    is_state = dtype != first.dtype
    return CacheLayout(
        shape=tuple(int(n) for n in first.shape),
        dtype=dtype,
        is_state=is_state,
        inputs=(KEY_CACHE, VALUE_CACHE),
        outputs=() if is_state else (KEY_CACHE_OUT, VALUE_CACHE_OUT),
    )


def _coreml_chunks(manifest: Manifest) -> tuple[int, bool]:
    settings = manifest.recipe.coreml
    return settings.prefill_chunk, settings.sequence_lengths != "range"


@dataclass(frozen=True)
class _TargetRules:
    """What must hold of a target's artifacts, where its cache is, and in what chunks it takes tokens."""

    check: Callable[[Manifest], None]
    cache: Callable[[Artifact], CacheLayout]
    chunks: Callable[[Manifest], tuple[int, bool]]


_TARGETS: Final[dict[Target, _TargetRules]] = {
    "onnx": _TargetRules(onnx_contract.check_manifest, _onnx_cache, lambda manifest: (0, False)),
    "coreml": _TargetRules(coreml_contract.check_manifest, _coreml_cache, _coreml_chunks),
}


def _check_expressible(value: Any) -> None:  # noqa: ANN401
    """See that every language can hold the values.

    Raises:
        BundleError: A number is beyond 32 bits, or a text holds half a character.
    """
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple):
        for inner in value:
            _check_expressible(inner)
    elif isinstance(value, str):
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise BundleError("malformed manifest: a text holds half of a character")
    elif isinstance(value, int) and abs(value) > _MAX_INT:
        raise BundleError("malformed manifest: a number is beyond 32 bits")
