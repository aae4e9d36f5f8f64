"""Greedy answers to many prompts side by side: a step reads the weights once for all of them.

Each prompt is read alone, from position 0 on, as a session reads it. Then the answers grow together, one
token a step, or several where they were guessed; a row has a position of its own and never sees what lies
behind it in the cache. So nothing but the rounding of float32 sums differs from answering one by one: another
token is taken only where two logits are closer than that. Of equal logits the first is taken. Which rows lie
side by side depends on the prompts alone, so answers are the same from run to run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch
from torch import Tensor

from fastvlm_convert.model.decoder import KVCache, Qwen2, rotary_table
from fastvlm_convert.model.guesses import guessed_tokens
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.weights.model_config import DecoderConfig

ROWS: Final = 32  # answered side by side: 300 MB of keys and values at 0.5B


_AT_ONCE: Final = 32  # tokens of all rows that a step reads: more would take longer than reading the weights
_MOST_GUESSED: Final = 7  # of one row


@dataclass
class _RowsCache(KVCache):
    """Keys and values of rows of different lengths, to which as many positions each are added at a time.

    Attributes:
        lengths: Positions stored of every row, int64 [B]; one tensor for all layers, which the loop advances.
    """

    lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store T positions of every row; returns all up to the longest row's."""
        tokens = key.shape[2]
        rows, places = torch.arange(len(key))[:, None], self._places(tokens)
        self.key[rows, :, places] = key.transpose(1, 2)
        self.value[rows, :, places] = value.transpose(1, 2)
        end = int(self.lengths.max()) + tokens
        return self.key[:, :, :end], self.value[:, :, :end]

    def mask(self, tokens: int) -> Tensor:
        """What each new position of a row sees: the row's own up to itself; [B, 1, T, longest]."""
        positions = torch.arange(int(self.lengths.max()) + tokens)
        return (positions <= self._places(tokens)[:, :, None])[:, None]

    def angles(self, config: DecoderConfig, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every row's new positions, [B, 1, T, D / 2] each."""
        places = self._places(tokens)
        cos, sin = rotary_table(config, int(self.lengths.max()) + tokens)
        return cos[places][:, None], sin[places][:, None]

    def _places(self, tokens: int) -> Tensor:
        """Where new positions of every row go, int64 [B, T]."""
        return self.lengths[:, None] + torch.arange(tokens)


def greedy_answers(
    decoder: Qwen2,
    prompts: Sequence[Tensor],
    limits: Sequence[int],
    eos_token_ids: Sequence[int],
    on_progress: OnShare = ignore_share,
) -> list[list[int]]:
    """Answer prompts.

    Args:
        decoder: The model.
        prompts: Embeddings, float32 [tokens, hidden] each; at least one token.
        limits: Most tokens of each answer, the end token included; at least 1.
        eos_token_ids: Ids at which an answer ends.
        on_progress: Called with the share of all tokens, read or said, that is done, 0..1.

    Returns:
        Token ids of each answer, the end token included where there is room for it.
    """
    reading = partial(read_prompt, decoder)
    said = _side_by_side(decoder, prompts, limits, eos_token_ids, on_progress, reading)
    return [ids for together in said for ids in together.said]


@dataclass(frozen=True)
class ReadPrompt:
    """What reading a prompt leaves.

    Attributes:
        caches: Its keys and values, one cache a layer, for one row; not to be changed.
        logits: At its end, float32 [vocab].
    """

    caches: Sequence[KVCache]
    logits: Tensor


Read = Callable[[Tensor], ReadPrompt]
"""Reads a prompt, embeddings float32 [tokens, hidden], from position 0 on."""


@torch.inference_mode()
def read_prompt(decoder: Qwen2, prompt: Tensor) -> ReadPrompt:
    """Read a prompt, embeddings float32 [tokens, hidden]."""
    caches = decoder.new_cache(len(prompt))
    return ReadPrompt(caches, decoder(prompt[None], caches, last_only=True)[0, -1])


@torch.inference_mode()
def forced_logits(decoder: Qwen2, prompt: ReadPrompt, token_ids: Tensor) -> Tensor:
    """Logits after a prompt and after each of the tokens int64 [m] behind it, in one pass; [m + 1, vocab]."""
    caches = []
    for read in prompt.caches:
        empty = torch.zeros(1, read.key.shape[1], len(token_ids), read.key.shape[3])
        known = (values[:, :, : read.length] for values in (read.key, read.value))
        key, value = (torch.cat([values, empty], 2) for values in known)
        caches.append(KVCache(key, value, read.length))
    hidden = decoder.hidden(decoder.embed_tokens(token_ids)[None], caches)[0]
    return torch.cat([prompt.logits[None], decoder.logits(hidden)])


@torch.inference_mode()
def answers_with_logits(
    decoder: Qwen2,
    prompts: Sequence[Tensor],
    limits: Sequence[int],
    eos_token_ids: Sequence[int],
    on_progress: OnShare = ignore_share,
    *,
    hints: Sequence[Sequence[int]] | None = None,
    read: Read | None = None,
) -> list[tuple[list[int], Tensor]]:
    """Answer prompts, and read every answer once more in one pass over the prompt's keys and values.

    More than six parameters: those of `greedy_answers`, and two for those who know something already.

    Args: Those of `greedy_answers`, and:
        hints: What the answers may be like, by which they are guessed (see `guesses`).
        read: Reads a prompt where that is not `read_prompt`, because it may be known.

    Returns:
        Token ids of each answer, and logits float32 [fed + 1, vocab]: after the prompt, and after each token
        but an end token; where an answer is nothing else, after that.
    """
    reading = read or partial(read_prompt, decoder)
    hints = hints or [()] * len(prompts)
    found = []
    for together in _side_by_side(decoder, prompts, limits, eos_token_ids, on_progress, reading, hints):
        for ids, prompt in zip(together.said, together.prompts, strict=True):
            fed = torch.tensor([token for token in ids if token not in eos_token_ids] or ids)
            found.append((ids, forced_logits(decoder, prompt, fed)))
    return found


@dataclass(frozen=True)
class _Together:
    """Some prompts and what was answered to them side by side.

    Attributes:
        prompts: The prompts as they were read, in memory that is shared with the answers.
        said: Token ids of each answer, the end token included where there is room for it.
    """

    prompts: Sequence[ReadPrompt]
    said: list[list[int]]


@torch.inference_mode()
def _side_by_side(
    decoder: Qwen2,
    prompts: Sequence[Tensor],
    limits: Sequence[int],
    eos_token_ids: Sequence[int],
    on_progress: OnShare,
    read: Read,
    hints: Sequence[Sequence[int]] | None = None,
) -> Iterator[_Together]:
    """Answer prompts, so many at a time as memory should be taken for; guesses nothing without hints.

    More than six parameters: those of `answers_with_logits`.
    """
    total, done = sum(map(len, prompts)) + sum(limits), 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        on_progress(done / total)

    for start in range(0, len(prompts), ROWS):
        rows = slice(start, start + ROWS)
        near = None if hints is None else hints[rows]
        caches, known = _read_rows(decoder, prompts[rows], max(limits[rows]) + _MOST_GUESSED, read, advance)
        said = _continued(decoder, caches, known, limits[rows], eos_token_ids, near or ())
        advance(sum(limits[rows]))
        yield _Together(known, said)


def _read_rows(
    decoder: Qwen2, prompts: Sequence[Tensor], room: int, read: Read, advance: Callable[[int], None]
) -> tuple[list[_RowsCache], list[ReadPrompt]]:
    """Read every prompt into caches of all rows, with room behind the longest; and each row's beginning."""
    lengths, config = torch.tensor([len(prompt) for prompt in prompts]), decoder.config
    shape = (len(prompts), config.num_kv_heads, int(lengths.max()) + room, config.head_dim)
    caches = [_RowsCache(torch.zeros(shape), torch.zeros(shape), lengths=lengths) for _ in decoder.layers]
    known = []
    for row, prompt in enumerate(prompts):
        own, rows, length = read(prompt), slice(row, row + 1), len(prompt)
        for cache, layer in zip(caches, own.caches, strict=True):
            cache.key[rows, :, :length] = layer.key[:, :, :length]
            cache.value[rows, :, :length] = layer.value[:, :, :length]
        begun = [KVCache(cache.key[rows], cache.value[rows], length) for cache in caches]
        known.append(ReadPrompt(begun, own.logits))
        advance(length)
    return caches, known


def _continued(
    decoder: Qwen2,
    caches: Sequence[_RowsCache],
    prompts: Sequence[ReadPrompt],
    limits: Sequence[int],
    eos: Sequence[int],
    hints: Sequence[Sequence[int]],
) -> list[list[int]]:
    """What every row says after its prompt; rows that have ended wait, unheard. No hints, no guesses."""
    most = min(_MOST_GUESSED, _AT_ONCE // len(prompts) - 1) if hints else 0
    said = [[int(prompt.logits.argmax())] for prompt in prompts]

    def has_ended(row: int) -> bool:
        return len(said[row]) >= limits[row] or said[row][-1] in eos

    while not all(map(has_ended, range(len(said)))):
        given = [row[-1:] for row in said]
        for row, tokens in enumerate(given):
            if most and not has_ended(row):
                tokens += guessed_tokens(said[row], hints[row], most)
        width = max(map(len, given))
        padded = torch.tensor([tokens + tokens[:1] * (width - len(tokens)) for tokens in given])
        likeliest = decoder.logits(decoder.hidden(decoder.embed_tokens(padded), caches)).argmax(-1)
        for row, tokens in enumerate(given):
            if not has_ended(row):
                kept = _keep(said[row], tokens, likeliest[row].tolist(), limits[row], eos)
                caches[0].lengths[row] += kept  # of all layers
    return said


def _keep(
    said: list[int], given: Sequence[int], likeliest: Sequence[int], limit: int, eos: Sequence[int]
) -> int:
    """Add what a row says to tokens that it was given, until the next is not what it says; how many."""
    kept = 0
    for token, guess in zip(likeliest, [*given[1:], None], strict=False):
        said.append(token)
        kept += 1
        if token != guess or token in eos or len(said) == limit:
            break
    return kept
