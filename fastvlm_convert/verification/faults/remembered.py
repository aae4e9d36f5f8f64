"""A reference that computes nothing twice, however many copies of a bundle are held against it."""

import hashlib
from collections.abc import Callable

import numpy as np

from fastvlm_convert.session import Session
from fastvlm_convert.verification.faults.around import Around

Call = Callable[[], np.ndarray]


class Remembered(Around):
    """Gives what the session gave when it was last called in the same way, in the same sequence.

    Args:
        session: Deterministic. The outputs of every call are kept in memory.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._outputs: dict[bytes, np.ndarray] = {}
        self._sequence: list[Call] = []  # calls since the last prefill
        self._key = b""  # of the sequence
        self._reached = b""  # key of the sequence that the session itself has computed

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] -> float32 [num_image_tokens, hidden]."""
        key = _key(b"image", pixel_values)
        return self._once(key, lambda: self.inner.encode_image(pixel_values))

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """int64 [n] -> float32 [n, hidden]."""
        return self._once(_key(b"embed", token_ids), lambda: self.inner.embed(token_ids))

    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Start a new sequence; logits of the last position, float32 [vocab]."""
        self._sequence, self._key = [], b"prefill"
        return self._next(inputs_embeds, lambda: self.inner.prefill(inputs_embeds))

    def decode(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Append one token; its logits, float32 [vocab]."""
        return self._next(inputs_embeds, lambda: self.inner.decode(inputs_embeds))

    def extend(self, inputs_embeds: np.ndarray, position: int) -> np.ndarray:
        """Append tokens from a position on; logits of the last, float32 [vocab]."""
        self._key += position.to_bytes(4)
        return self._next(inputs_embeds, lambda: self.inner.extend(inputs_embeds, position))

    def _once(self, key: bytes, call: Call) -> np.ndarray:
        if key not in self._outputs:
            self._outputs[key] = call()
        return self._outputs[key]

    def _next(self, inputs: np.ndarray, call: Call) -> np.ndarray:
        before, self._key = self._key, _key(self._key, inputs)
        self._sequence.append(call)
        if self._key not in self._outputs:
            if self._reached != before:  # what came before was remembered, so its cache was not filled
                for earlier in self._sequence[:-1]:
                    earlier()
            self._outputs[self._key] = call()
            self._reached = self._key
        return self._outputs[self._key]


def _key(before: bytes, values: np.ndarray) -> bytes:
    content = np.ascontiguousarray(values)
    return hashlib.sha256(before + str(values.shape).encode() + content.tobytes()).digest()
