"""A frozen language model that reads projected pictures: its forward pass for packed rows, and their packing.

A row is `image tokens | question 1 answer 1 | question 2 answer 2 | ...` behind the system message, whose
keys and values never change and are computed once. Every question sees that prefix, the picture and itself,
at the positions it would have alone. Gradients reach the image tokens only.

Shapes: B rows, P prefix tokens, S row length, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from tokenizers import Tokenizer
from torch import Tensor

from fastvlm_convert.demo.questions import Question
from fastvlm_convert.model.decoder import Attention, Qwen2, rotary_table, rotate

IGNORE = -1
IMAGE_TOKENS = 16
ROW_LENGTH = 192
_PREFIX = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_QUESTION = "\n{}<|im_end|>\n<|im_start|>assistant\n"
_END = "<|im_end|>"


@dataclass(frozen=True)
class Row:
    """Questions about one picture: int64 [S] each; segment 0 is the picture, questions count from 1."""

    ids: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Scores:
    """What a pass over some rows found; `logits` of the tokens that have a target."""

    logits: Tensor
    targets: Tensor


class Packer:
    """Turns questions into rows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Keep the tokenizer; encode what never changes."""
        self._tokenizer = tokenizer
        self.prefix = self._ids(_PREFIX)
        self._end = tokenizer.token_to_id(_END)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def pack(self, questions: Sequence[Question]) -> tuple[Row, list[Question]]:
        """Fill one row; return it with the questions that did not fit."""
        ids, segments = np.zeros(ROW_LENGTH, np.int64), np.full(ROW_LENGTH, IGNORE, np.int64)
        targets, positions = np.full(ROW_LENGTH, IGNORE, np.int64), np.zeros(ROW_LENGTH, np.int64)
        first = len(self.prefix)
        used = IMAGE_TOKENS
        segments[:used] = 0
        positions[:used] = first + np.arange(used)
        packed, left = [], []
        for question in questions:
            prompt = self._ids(_QUESTION.format(question.question))
            answer = [*self._ids(question.answer), self._end]
            length = len(prompt) + len(answer) - 1
            if used + length > ROW_LENGTH:
                left.append(question)
                continue
            packed.append(question)
            span = slice(used, used + length)
            ids[span] = [*prompt, *answer[:-1]]
            targets[used + len(prompt) - 1 : used + length] = answer
            segments[span] = len(packed)
            positions[span] = first + IMAGE_TOKENS + np.arange(length)
            used += length
        return Row(ids, targets, segments, positions, tuple(packed)), left


class FrozenReader:
    """The language model behind a system message that it has read once."""

    def __init__(self, decoder: Qwen2, prefix: Sequence[int]) -> None:
        """Read the prefix."""
        self._decoder, self._length = decoder, len(prefix)
        cache = decoder.new_cache(self._length)
        with torch.no_grad():
            decoder(decoder.embed_tokens(torch.tensor([prefix])), cache)
        self._cache = [(layer.key, layer.value) for layer in cache]
        self._rope = rotary_table(decoder.config, self._length + IMAGE_TOKENS + ROW_LENGTH)

    def __call__(self, image_tokens: Tensor, rows: Sequence[Row]) -> Scores:
        """Read pictures (B, 16, D) with the questions about them."""
        ids, targets, segments, positions = (
            torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
            for name in ("ids", "targets", "segments", "positions")
        )
        # No row is read beyond its last token.
        length = int((segments != IGNORE).any(0).sum())
        ids, targets, segments, positions = (t[:, :length] for t in (ids, targets, segments, positions))
        x = torch.cat((image_tokens, self._decoder.embed_tokens(ids[:, IMAGE_TOKENS:])), 1)
        cos, sin = (table[positions][:, None] for table in self._rope)
        mask = self._mask(segments)
        for layer, past in zip(self._decoder.layers, self._cache, strict=True):
            x = x + _attend(layer.self_attn, layer.input_layernorm(x), (cos, sin), mask, past)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        asked = targets != IGNORE
        hidden = self._decoder.norm(x[asked])
        return Scores(F.linear(hidden, self._decoder.embed_tokens.weight), targets[asked])

    def _mask(self, segments: Tensor) -> Tensor:
        """(B, 1, S, P + S) bool: the prefix, the picture, and the earlier part of the own question."""
        rows, length = segments.shape
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        query, key = segments[:, :, None], segments[:, None, :]
        seen = causal & ((key == 0) | (key == query))
        return torch.cat((torch.ones(rows, length, self._length, dtype=torch.bool), seen), 2)[:, None]


def _attend(
    layer: Attention, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor]
) -> Tensor:
    rows, length, _ = x.shape
    q, k, v = (
        proj(x).view(rows, length, -1, layer.head_dim).transpose(1, 2)
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    keys, values = (
        torch.cat((kept.expand(rows, -1, -1, -1), new), 2)
        for kept, new in zip(past, (rotate(k, *rope), v), strict=True)
    )
    mixed = F.scaled_dot_product_attention(rotate(q, *rope), keys, values, attn_mask=mask, enable_gqa=True)
    return layer.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))
