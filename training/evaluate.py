"""Exact-match accuracy by kind of question, through teacher forcing.

Greedy decoding reproduces an answer if and only if each of its tokens is the most likely one
given the tokens before it, so one pass checks all answers without generating any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from data import Batch, HeldOut, make_batch
from network import Decoder
from torch import Tensor

ImageTokens = Callable[[Batch], Tensor]


def embed_row(decoder: Decoder, batch: Batch, image_tokens: Tensor, system_length: int) -> Tensor:
    """Embeddings (B, S, D) of a row, with its image tokens in place."""
    embeds = decoder.embed_tokens(batch.ids)
    after = system_length + image_tokens.shape[1]
    return torch.cat((embeds[:, :system_length], image_tokens, embeds[:, after:]), dim=1)


@torch.no_grad()
def exact_match(
    decoder: Decoder,
    image_tokens: ImageTokens,
    held_out: HeldOut,
    system_length: int,
    with_pixels: bool = True,
    batch_size: int = 32,
) -> dict[str, tuple[int, int]]:
    """How many questions of each kind were answered exactly, and how many asked."""
    right, asked = Counter(), Counter()
    for start in range(0, len(held_out.rows), batch_size):
        rows = held_out.rows[start : start + batch_size]
        scenes = [held_out.scenes[row.picture] for row in rows]
        batch = make_batch(scenes, [row.row for row in rows], with_pixels, held_out.style)
        embeds = embed_row(decoder, batch, image_tokens(batch), system_length)
        best = decoder.logits(decoder(embeds, batch.positions, batch.mask)).argmax(-1)
        wrong = (best != batch.targets) & (batch.targets >= 0)
        for index, row in enumerate(rows):
            for number, question in enumerate(row.questions, start=1):
                asked[question.kind] += 1
                right[question.kind] += not wrong[index][batch.segments[index] == number].any()
    return {kind: (right[kind], asked[kind]) for kind in held_out.style.kinds}


def overall(result: dict[str, tuple[int, int]]) -> float:
    """Share of all questions that were answered exactly."""
    return sum(r for r, _ in result.values()) / sum(n for _, n in result.values())


def summary(result: dict[str, tuple[int, int]]) -> str:
    """One line with the share for each kind."""
    kinds = " ".join(f"{kind} {r / max(n, 1):.3f}" for kind, (r, n) in result.items())
    return f"all {overall(result):.4f} | {kinds}"
