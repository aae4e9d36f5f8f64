"""Greedy answers to many prompts side by side: a step reads the weights once for all of them.

Each prompt is read alone, from position 0 on, as a session reads it. Then the answers grow together, one
token a step; a row has a position of its own and never sees what lies behind it in the cache. So nothing but
the rounding of float32 sums differs from answering one by one: another token is taken only where two logits
are closer than that. Of equal logits the first is taken. Which rows lie side by side depends on the prompts
alone, so answers are the same from run to run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from fastvlm_convert.model.decoder import KVCache, Qwen2, rotary_table
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.weights.model_config import DecoderConfig

ROWS: Final = 32  # answered side by side: 300 MB of keys and values at 0.5B


@dataclass
class _RowsCache(KVCache):
    """Keys and values of rows of different lengths, to which one position each is added at a time.

    Attributes:
        lengths: Positions stored of every row, int64 [B]; one tensor for all layers, which the loop advances.
    """

    lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store a position of every row; returns all up to the longest row's."""
        rows, end = torch.arange(len(key)), int(self.lengths.max()) + 1
        self.key[rows, :, self.lengths] = key[:, :, 0]
        self.value[rows, :, self.lengths] = value[:, :, 0]
        return self.key[:, :, :end], self.value[:, :, :end]

    def mask(self, tokens: int) -> Tensor:
        """What every row sees: its own positions, the new one included; [B, 1, 1, longest]."""
        assert tokens == 1, "rows grow by one position at a time"
        return (torch.arange(int(self.lengths.max()) + 1) <= self.lengths[:, None])[:, None, None]

    def angles(self, config: DecoderConfig, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every row's new position, [B, 1, 1, D / 2] each."""
        assert tokens == 1, "rows grow by one position at a time"
        cos, sin = rotary_table(config, int(self.lengths.max()) + 1)
        return cos[self.lengths][:, None, None], sin[self.lengths][:, None, None]


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
    said = _side_by_side(decoder, prompts, limits, eos_token_ids, on_progress)
    return [ids for together in said for ids in together.said]


@torch.inference_mode()
def answers_with_logits(
    decoder: Qwen2,
    prompts: Sequence[Tensor],
    limits: Sequence[int],
    eos_token_ids: Sequence[int],
    on_progress: OnShare = ignore_share,
) -> list[tuple[list[int], Tensor]]:
    """Answer prompts, and read every answer once more in one pass over the prompt's keys and values.

    Args: Those of `greedy_answers`.

    Returns:
        Token ids of each answer, and logits float32 [fed + 1, vocab]: after the prompt, and after each token
        but an end token; where an answer is nothing else, after that.
    """
    found = []
    for together in _side_by_side(decoder, prompts, limits, eos_token_ids, on_progress):
        for row, (ids, length) in enumerate(zip(together.said, together.lengths, strict=True)):
            fed = torch.tensor([token for token in ids if token not in eos_token_ids] or ids)
            rows = slice(row, row + 1)
            cache = [KVCache(layer.key[rows], layer.value[rows], length) for layer in together.caches]
            hidden = decoder.hidden(decoder.embed_tokens(fed)[None], cache)[0]
            found.append((ids, decoder.logits(torch.cat([together.hidden[rows], hidden]))))
    return found


@dataclass(frozen=True)
class _Together:
    """Some prompts and what was answered to them side by side.

    Attributes:
        caches: One a layer.
        lengths: Tokens of each prompt.
        hidden: The residual stream at the end of each prompt, float32 [B, hidden].
        said: Token ids of each answer, the end token included where there is room for it.
    """

    caches: Sequence[KVCache]
    lengths: Sequence[int]
    hidden: Tensor
    said: list[list[int]]


@torch.inference_mode()
def _side_by_side(
    decoder: Qwen2,
    prompts: Sequence[Tensor],
    limits: Sequence[int],
    eos_token_ids: Sequence[int],
    on_progress: OnShare,
) -> Iterator[_Together]:
    """Answer prompts, so many at a time as memory should be taken for."""
    total, done = sum(map(len, prompts)) + sum(limits), 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        on_progress(done / total)

    for start in range(0, len(prompts), ROWS):
        rows = slice(start, start + ROWS)
        caches, hidden = _read(decoder, prompts[rows], max(limits[rows]), advance)
        said = _continued(decoder, caches, hidden, limits[rows], eos_token_ids)
        advance(sum(limits[rows]))
        yield _Together(caches, [len(prompt) for prompt in prompts[rows]], hidden, said)


def _read(
    decoder: Qwen2, prompts: Sequence[Tensor], room: int, advance: Callable[[int], None]
) -> tuple[list[_RowsCache], Tensor]:
    """Read every prompt; the caches of all rows, and the residual stream at their ends, [B, hidden]."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    config = decoder.config
    shape = (len(prompts), config.num_kv_heads, int(lengths.max()) + room, config.head_dim)
    caches = [_RowsCache(torch.zeros(shape), torch.zeros(shape), lengths=lengths) for _ in decoder.layers]
    ends = []
    for row, prompt in enumerate(prompts):
        own = decoder.new_cache(len(prompt))
        ends.append(decoder.hidden(prompt[None], own)[0, -1])
        for cache, layer in zip(caches, own, strict=True):
            cache.key[row, :, : len(prompt)] = layer.key[0]
            cache.value[row, :, : len(prompt)] = layer.value[0]
        advance(len(prompt))
    return caches, torch.stack(ends)


def _continued(
    decoder: Qwen2, caches: Sequence[_RowsCache], hidden: Tensor, limits: Sequence[int], eos: Sequence[int]
) -> list[list[int]]:
    """What every row says after a residual stream; rows that have ended run along, unheard."""
    said: list[list[int]] = [[] for _ in limits]
    while True:
        tokens = decoder.logits(hidden).argmax(-1)
        for row, token, limit in zip(said, tokens.tolist(), limits, strict=True):
            if len(row) < limit and not (row and row[-1] in eos):
                row.append(token)
        if all(len(row) == limit or row[-1] in eos for row, limit in zip(said, limits, strict=True)):
            return said
        hidden = decoder.hidden(decoder.embed_tokens(tokens)[:, None], caches)[:, 0]
        caches[0].lengths += 1  # of all layers
