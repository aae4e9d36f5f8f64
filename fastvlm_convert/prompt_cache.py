"""What is kept of prompts, so that a picture is encoded once and a beginning is read once.

A prompt is read in chunks that end after each picture and where each earlier answer begins, whether anything
is kept or not: results then cannot depend on what a cache holds.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, Generic, Protocol, TypeVar

import numpy as np

from fastvlm_convert.prompt import Prompt
from fastvlm_convert.session import KvPrefix

_SHORTEST: Final = 2  # tokens of a chunk: runtimes read a single token with other kernels, whose bits differ
# Some dozens of pictures of the 0.5B model, and a full context even of the 7B.
_FEATURE_BYTES: Final = 32 << 20
_PREFIX_BYTES: Final = 128 << 20

V = TypeVar("V")


class PromptCache(Protocol):
    """Keeps features and prefixes of one model by key, as long as it likes; several threads use it."""

    def get_features(self, key: str) -> np.ndarray | None:
        """Image tokens of a picture, float32 [num_image_tokens, hidden], by `image_key`."""
        ...

    def put_features(self, key: str, features: np.ndarray) -> None:
        """Keep image tokens; nobody changes them afterwards."""
        ...

    def get_prefix(self, key: str) -> KvPrefix | None:
        """Keys and values of a chunk, by the key of everything up to its end (`prefix_keys`)."""
        ...

    def put_prefix(self, key: str, prefix: KvPrefix) -> None:
        """Keep keys and values of a chunk; nobody changes them afterwards."""
        ...


class MemoryPromptCache:
    """What was used last, in memory; implements `PromptCache`.

    Args:
        feature_bytes: Most bytes of image tokens.
        prefix_bytes: Most bytes of keys and values.
    """

    def __init__(self, feature_bytes: int = _FEATURE_BYTES, prefix_bytes: int = _PREFIX_BYTES) -> None:
        self._features = _Latest[np.ndarray](feature_bytes, lambda features: features.nbytes)
        self._prefixes = _Latest[KvPrefix](prefix_bytes, lambda prefix: prefix.num_bytes)

    def get_features(self, key: str) -> np.ndarray | None:
        """Image tokens of a picture, float32 [num_image_tokens, hidden]."""
        return self._features.get(key)

    def put_features(self, key: str, features: np.ndarray) -> None:
        """Keep image tokens."""
        self._features.put(key, features)

    def get_prefix(self, key: str) -> KvPrefix | None:
        """Keys and values of a chunk."""
        return self._prefixes.get(key)

    def put_prefix(self, key: str, prefix: KvPrefix) -> None:
        """Keep keys and values of a chunk."""
        self._prefixes.put(key, prefix)


class _Latest(Generic[V]):
    """The values that were used last."""

    def __init__(self, max_bytes: int, size_of: Callable[[V], int]) -> None:
        self._left = max_bytes
        self._size_of = size_of
        self._values: OrderedDict[str, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> V | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: str, value: V) -> None:
        with self._lock:
            self._drop(key)
            self._values[key] = value
            self._left -= self._size_of(value)
            while self._left < 0:
                self._drop(next(iter(self._values)))

    def _drop(self, key: str) -> None:
        old = self._values.pop(key, None)
        if old is not None:
            self._left += self._size_of(old)


def image_key(pixel_values: np.ndarray) -> str:
    """SHA-256 of what the encoder gets, float32 [1, 3, height, width], its shape included; hexadecimal."""
    values = np.ascontiguousarray(pixel_values, np.float32)
    digest = hashlib.sha256(repr(values.shape).encode())
    digest.update(values.data)
    return digest.hexdigest()


def split_prompt(prompt: Prompt, tokens_per_image: int) -> list[Prompt]:
    """The chunks in which a prompt is read, in order: they end after pictures and before earlier answers.

    A picture's chunk that would end at an odd position takes one more token of the text that follows:
    quantized matrices are multiplied two rows at a time, and a row without a partner comes out with other
    bits. Chunks before answers end where the earlier prompt did. None but that of a prompt of one token is a
    single token.
    """
    length = prompt.length(tokens_per_image)
    places = sorted({*((number, 0) for number in range(1, len(prompt.segments))), *prompt.answers_at})
    chunks: list[Prompt] = []
    begin, read = (0, 0), 0
    for segment, place in places:
        position = sum(map(len, prompt.segments[:segment])) + segment * tokens_per_image + place
        is_picture = (segment, place) not in prompt.answers_at
        if is_picture and position % 2 and place < len(prompt.segments[segment]):
            place, position = place + 1, position + 1
        if position - read >= _SHORTEST and length - position >= _SHORTEST:
            chunks.append(_between(prompt, begin, (segment, place)))
            begin, read = (segment, place), position
    last = len(prompt.segments) - 1
    return [*chunks, _between(prompt, begin, (last, len(prompt.segments[last])))]


def prefix_keys(chunks: Sequence[Prompt], image_keys: Sequence[str]) -> list[str]:
    """A key for the end of each chunk: SHA-256 over everything before it, in hexadecimal.

    Args:
        chunks: What `split_prompt` gives.
        image_keys: `image_key` of all pictures in their order.
    """
    keys = iter(image_keys)
    found: list[str] = []
    chain = b""
    for chunk in chunks:
        digest = hashlib.sha256(chain)
        for number, segment in enumerate(chunk.segments):
            if number:
                _add(digest, b"image", next(keys).encode())
            _add(digest, b"text", np.ascontiguousarray(segment, "<i8").tobytes())
        chain = digest.digest()
        found.append(digest.hexdigest())
    return found


def _add(digest: "hashlib._Hash", kind: bytes, content: bytes) -> None:
    """Every part says how long it is, so that no two sequences of parts are the same bytes."""
    digest.update(kind + len(content).to_bytes(8, "little") + content)


def _between(prompt: Prompt, begin: tuple[int, int], end: tuple[int, int]) -> Prompt:
    """A part of a prompt; both ends are a segment's number and a place in it."""
    segments = list(prompt.segments[begin[0] : end[0] + 1])
    segments[-1] = segments[-1][: end[1]]
    segments[0] = segments[0][begin[1] :]
    return Prompt(tuple(segments), prompt.images[begin[0] : end[0]])
