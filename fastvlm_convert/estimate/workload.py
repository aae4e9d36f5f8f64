"""What a target of a bundle takes: bytes and multiplications of a picture, of its prompt and of a token."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.arithmetic import ceil_div, num_elements
from fastvlm_convert.errors import BundleError, MissingDependencyError
from fastvlm_convert.estimate.work import Work
from fastvlm_convert.io_names import (
    BATCH,
    DECODE,
    HEIGHT,
    INPUTS_EMBEDS,
    KEY_CACHE,
    MAIN,
    PAST_SEQUENCE,
    PREFILL,
    PREPARED_PIXELS,
    SEQUENCE,
    TOTAL_SEQUENCE,
    VALUE_CACHE,
    WIDTH,
    TensorSpec,
)
from fastvlm_convert.manifest import Artifact, Manifest, takes_pictures
from fastvlm_convert.runtime import coreml_contract, onnx_contract
from fastvlm_convert.targets import Target

_ITEM: Final = {"float32": 4, "float16": 2}


@dataclass(frozen=True)
class TargetWork:
    """What a target takes.

    Attributes:
        target: The format.
        num_image_tokens: Tokens of a picture.
        context_length: Tokens that the cache holds.
        vision: Encoding one picture.
        prefill: The picture's tokens through the decoder, up to the first token's logits.
        decode_after_picture: One token right after the picture.
        decode_at_context: One token at the end of the context.
        file_bytes: The files that an app loads.
        cache_bytes: The whole cache.
    """

    target: Target
    num_image_tokens: int
    context_length: int
    vision: Work
    prefill: Work
    decode_after_picture: Work
    decode_at_context: Work
    file_bytes: int
    cache_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Files, cache, weights made of stored ones, and the most that results take at a time."""
        works = (self.vision, self.prefill, self.decode_at_context)
        made_bytes = self.vision.made_bytes + self.prefill.made_bytes
        return self.file_bytes + self.cache_bytes + made_bytes + max(work.peak_bytes for work in works)


def target_work(bundle: Path, manifest: Manifest, target: Target) -> TargetWork:
    """What a target of a bundle takes, from its files.

    Raises:
        BundleError: A file is missing or damaged, or holds what is not known here.
        MissingDependencyError: The package that reads the format is not installed.
    """
    try:
        work = _COUNTERS[target](bundle, manifest)
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, f"an estimate of the {target} target") from error
    if not work.decode_after_picture.weight_bytes:
        raise BundleError(f"the {target} decoder reads no weights", where=bundle)
    return work


def _onnx(bundle: Path, manifest: Manifest) -> TargetWork:
    from fastvlm_convert.estimate.onnx_work import onnx_work

    onnx_contract.check_manifest(manifest)
    contract = manifest.contract
    artifacts = [manifest.artifact("onnx", "vision"), manifest.artifact("onnx", "embed", MAIN)]
    decoder = manifest.artifact("onnx", "decoder")
    vision, embed = (bundle / artifact.files[0] for artifact in artifacts)
    path = bundle / decoder.files[0]

    # A graph that prepares pictures counts from where they are prepared: the rest depends on their size.
    edge, given = contract.image_size, {}
    if takes_pictures(artifacts[0]):
        given[PREPARED_PIXELS] = (1, 3, edge, edge)

    def call(tokens: int, position: int) -> Work:
        sizes = {
            BATCH: 1, SEQUENCE: tokens, PAST_SEQUENCE: position, TOTAL_SEQUENCE: position + tokens,
        }  # fmt: skip
        return onnx_work(path, sizes, {})

    row = onnx_work(embed, {BATCH: 1, SEQUENCE: 1}, {})
    tokens, last = contract.num_image_tokens, contract.context_length - 1
    past = [spec for spec in decoder.inputs if spec.name.startswith("past_key_values.")]
    return TargetWork(
        target="onnx",
        num_image_tokens=tokens,
        context_length=contract.context_length,
        vision=onnx_work(vision, {BATCH: 1, HEIGHT: edge, WIDTH: edge}, given),
        prefill=call(tokens, 0),
        decode_after_picture=row + call(1, min(tokens, last)),
        decode_at_context=row + call(1, last),
        file_bytes=_file_bytes(manifest, (*artifacts, decoder)),
        cache_bytes=_bytes(past, contract.context_length),
    )


def _coreml(bundle: Path, manifest: Manifest) -> TargetWork:
    from fastvlm_convert.estimate.mil_work import chunk_of, mil_work

    coreml_contract.check_manifest(manifest)
    contract = manifest.contract
    vision, embed = manifest.artifact("coreml", "vision"), manifest.artifact("coreml", "embed")
    decoding = coreml_contract.chain(manifest, DECODE)
    prefilling = coreml_contract.chain(manifest, PREFILL) or decoding
    tokens = contract.num_image_tokens
    first = prefilling[0]
    chunk, is_flexible = chunk_of(bundle / _package(first), first.function, INPUTS_EMBEDS)
    calls = [chunk] * ceil_div(tokens, chunk)
    if is_flexible and tokens % chunk:
        calls[-1] = tokens % chunk
    total = Work()
    for count in dict.fromkeys(calls):
        work = _chain_work(bundle, prefilling, count)
        for _ in range(calls.count(count)):
            total += work
    # The program reads its whole cache, however little of it is filled.
    token = mil_work(bundle / _package(embed), embed.function, 1) + _chain_work(bundle, decoding, 1)
    caches = [spec for step in decoding for spec in step.inputs if spec.name in (KEY_CACHE, VALUE_CACHE)]
    return TargetWork(
        target="coreml",
        num_image_tokens=tokens,
        context_length=contract.context_length,
        vision=mil_work(bundle / _package(vision), vision.function, 1),
        prefill=total,
        decode_after_picture=token,
        decode_at_context=token,
        file_bytes=_file_bytes(manifest, (vision, embed, *decoding)),
        cache_bytes=_bytes(caches, contract.context_length),
    )


def _chain_work(bundle: Path, functions: Sequence[Artifact], tokens: int) -> Work:
    """Of one step of a decoder, which may lie in several packages."""
    from fastvlm_convert.estimate.mil_work import mil_work

    return sum((mil_work(bundle / _package(f), f.function, tokens) for f in functions), Work())


def _mlx(bundle: Path, manifest: Manifest) -> TargetWork:
    from fastvlm_convert.estimate.mlx_work import MlxWeights

    contract, decoder = manifest.contract, manifest.artifact("mlx", "decoder")
    weights = MlxWeights(bundle / decoder.files[0])
    tokens, last = contract.num_image_tokens, contract.context_length - 1
    end = weights.decoder(1, last, 1)
    return TargetWork(
        target="mlx",
        num_image_tokens=tokens,
        context_length=contract.context_length,
        vision=weights.vision(contract.image_size),
        prefill=weights.decoder(tokens, 0, 0),
        decode_after_picture=weights.decoder(1, min(tokens, last), 1),
        decode_at_context=end,
        file_bytes=_file_bytes(manifest, (decoder,)),
        cache_bytes=end.cache_bytes * contract.context_length // (contract.context_length + 1),
    )


_COUNTERS: Final[dict[Target, Callable[[Path, Manifest], TargetWork]]] = {
    "onnx": _onnx,
    "coreml": _coreml,
    "mlx": _mlx,
}


def _package(artifact: Artifact) -> Path:
    """The folder of a Core ML artifact, whose files lie in it.

    Raises:
        BundleError: There is none.
    """
    for folder in Path(artifact.files[0]).parents:
        if folder.suffix == ".mlpackage":
            return folder
    raise BundleError(f"'{artifact.files[0]}' does not lie in a Core ML package")


def _file_bytes(manifest: Manifest, artifacts: Iterable[Artifact]) -> int:
    return sum(manifest.files[name].size for name in {name for a in artifacts for name in a.files})


def _bytes(specs: Iterable[TensorSpec], context_length: int) -> int:
    """Bytes of the cache's tensors, one sequence as long as the context."""
    sizes = {BATCH: 1, PAST_SEQUENCE: context_length}
    total = 0
    for spec in specs:
        shape = [sizes.get(n, 1) if isinstance(n, str) else n for n in spec.shape]
        total += num_elements(shape) * _ITEM[spec.dtype.removesuffix("_state")]
    return total
