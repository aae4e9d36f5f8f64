"""What every runtime implements: a model that can be run, with one KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import numpy as np

from fastvlm_convert.progress import OnShare


class Session(Protocol):
    """A model that can be run, holding one KV cache.

    Attributes:
        executed_by: What executes it, for reports: `torch 2.13.0`, `onnxruntime 1.32.0`.
        context_length: Tokens the cache holds, prompt and answer together.
        num_image_tokens: Tokens one image becomes.
    """

    executed_by: str
    context_length: int
    num_image_tokens: int

    @property
    def trouble(self) -> str | None:
        """The operation that first gave NaN or infinity, in words, where the runtime can tell."""
        ...

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] -> projected image tokens, float32 [num_image_tokens, hidden]."""
        ...

    def prepare(self, pictures: np.ndarray) -> np.ndarray:
        """What the encoder gets of what `encode_image` is given, float32 [1, 3, S, S].

        The same, but for a graph that prepares pictures itself.
        """
        ...

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """int64 [n] -> float32 [n, hidden]."""
        ...

    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Start a new sequence with float32 [n, hidden]; logits of the last position, float32 [vocab]."""
        ...

    def decode(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Append one token, float32 [1, hidden]; its logits, float32 [vocab]."""
        ...

    def extend(self, inputs_embeds: np.ndarray, position: int) -> np.ndarray:
        """Append float32 [n, hidden] from a position on; logits of the last, float32 [vocab].

        Keys and values of the positions that are skipped are zero. Where a runtime takes tokens in chunks,
        both the tokens before and the position must be a multiple of the chunk.
        """
        ...


@runtime_checkable
class ReadsAtOnce(Session, Protocol):
    """A session that reads known tokens in one pass, and answers many prompts in fewer passes."""

    def teacher_forced(self, inputs_embeds: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        """Start a new sequence with embeddings and then tokens.

        Args:
            inputs_embeds: float32 [n, hidden].
            token_ids: int64 [m].

        Returns:
            Logits after the last of the embeddings and after each token, float32 [m + 1, vocab].
        """
        ...

    def greedy_answers(
        self,
        prompts: Sequence[np.ndarray],
        limits: Sequence[int],
        eos_token_ids: Sequence[int],
        on_progress: OnShare,
        hints: Sequence[Sequence[int]] | None = None,
    ) -> list[tuple[list[int], np.ndarray]]:
        """Answer prompts side by side.

        Args:
            prompts: Embeddings, float32 [tokens, hidden] each.
            limits: Most tokens of each answer, the end token included.
            eos_token_ids: Ids at which an answer ends.
            on_progress: Called with the share that is done, 0..1.
            hints: What each answer may be like, where that is known: the more alike they are, the sooner the
                answer is there.

        Returns:
            Token ids of each answer, the end token included where there is room for it; and logits, float32
            [fed + 1, vocab], after the prompt and after each token but an end token, or after that where an
            answer is nothing else. They are those of one pass.
        """
        ...


@dataclass(frozen=True)
class KvPrefix:
    """Keys and values of some positions of a sequence.

    Attributes:
        start: The first position.
        stop: The position behind the last.
        values: Every tensor of the cache in the session's own order, [heads, stop - start, head_dim] each.
    """

    start: int
    stop: int
    values: tuple[np.ndarray, ...]

    @property
    def num_bytes(self) -> int:
        """Memory that the values take."""
        return sum(v.nbytes for v in self.values)


@runtime_checkable
class ReusesPrefixes(Session, Protocol):
    """A session that can begin with keys and values of an earlier sequence of the same weights."""

    def another(self) -> Self:
        """A new sequence over the same weights, for another request."""
        ...

    def copy_prefix(self, length: int, start: int = 0) -> KvPrefix:
        """Copies of the positions of this sequence from `start` to before `length`."""
        ...

    def start_from(self, prefixes: Sequence[KvPrefix]) -> None:
        """Begin a new sequence with prefixes; the first starts at 0, and each next where one stops."""
        ...

    def append(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Append float32 [n, hidden]; logits of the last position, float32 [vocab]."""
        ...
