"""Stand-ins for image tokens, built from dense labels, so that the decoder can learn before the encoder has.

A label's rows are the embedding of its word plus a learned offset, so the image tokens speak the
decoder's language from the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from data import Batch
from labels import FIRST_TOKENS
from tokenizers import Tokenizer
from torch import Tensor, nn

from fastvlm_convert.demo.scene import COLORS, PLACES, SHAPES, SIZES

Fields = Mapping[str, Sequence[str]]


class SymbolEncoder(nn.Module):
    """Dense labels (B, 16, fields) to image token embeddings (B, 16, D)."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, hidden: int, fields: Fields) -> None:
        """Find the words of all labels; a single character stands inside a word."""
        super().__init__()
        labels = [value for values in fields.values() for value in values]
        words = torch.zeros(len(labels), vocab_size)
        for index, value in enumerate(labels):
            for token in tokenizer.encode(value if len(value) < 2 else " " + value).ids:
                words[index, token] = 1.0
        sizes = [len(values) for values in fields.values()]
        offsets = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)
        self.delta = nn.Parameter(torch.randn(len(labels), hidden) * 0.7 * hidden**-0.5)

    def forward(self, labels: Tensor, embedding: Tensor) -> Tensor:
        """Sum the rows of all labels, given the word embedding (V, D)."""
        rows = self.words @ embedding + self.delta
        return F.embedding(labels + self.offsets, rows).sum(2)


class DenseHeads(nn.Linear):
    """Linear read-outs of all labels from vision features; discarded after training."""

    def __init__(self, feature_size: int, fields: Fields) -> None:
        """One output per label."""
        self.sizes = [len(values) for values in fields.values()]
        super().__init__(feature_size, sum(self.sizes))

    def losses(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and accuracy per field (fields,), for features (B, N, C)."""
        losses, right = [], []
        for index, logits in enumerate(self(features).split(self.sizes, dim=-1)):
            target = labels[:, :, index]
            losses.append(F.cross_entropy(logits.flatten(0, 1), target.flatten()))
            right.append((logits.detach().argmax(-1) == target).float().mean())
        return torch.stack(losses), torch.stack(right)


class FactHeads(nn.Module):
    """Read-outs of a shape's facts wherever the text names it; discarded after training.

    Finding a shape and reporting on it are each useless alone, so neither emerges by itself. Asking for the
    facts at the shape's own name, halfway through the decoder, teaches the first of the two; asking one
    layer later where it is relative to the shape named before does the same for relations.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, hidden: int) -> None:
        """Find the tokens that name shapes."""
        super().__init__()
        shape_of_token = torch.zeros(vocab_size, dtype=torch.long)
        for index, name in enumerate(SHAPES, start=1):
            shape_of_token[tokenizer.encode(" " + name).ids] = index
        self.register_buffer("shape_of_token", shape_of_token, persistent=False)
        self._sizes = (1 + len(COLORS), 1 + len(SIZES), 1 + len(PLACES))
        self.norm = nn.RMSNorm(hidden)
        self.linear = nn.Linear(hidden, sum(self._sizes))
        self.relation_norm = nn.RMSNorm(hidden)
        self.relation = nn.Linear(hidden, 9)

    def forward(self, streams: list[Tensor], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Loss and accuracies, given the residual stream (B, S, D) after every layer."""
        named = self.shape_of_token[batch.ids]
        where = named.nonzero(as_tuple=True)
        cells = batch.labels[:, FIRST_TOKENS]
        # Shape index (0: no shape) -> its facts in every picture, 0 where it is absent.
        found = cells[:, :, 0][:, None] == torch.arange(1 + len(SHAPES))[:, None]
        found[:, 0] = False
        place = (found * torch.arange(1, 1 + len(PLACES))).sum(2)
        color, size = ((found * cells[:, None, :, field]).sum(2) for field in (1, 2))

        middle = len(streams) // 2
        logits = self.linear(self.norm(streams[middle - 1][where])).split(self._sizes, dim=-1)
        picture, shape = where[0], named[where]
        loss, known = logits[0].new_zeros(()), torch.ones_like(shape, dtype=torch.bool)
        for scores, facts in zip(logits, (color, size, place), strict=True):
            target = facts[picture, shape]
            loss = loss + F.cross_entropy(scores, target)
            known = known & (scores.argmax(-1) == target)

        before = _named_before(named, batch.segments)[where]
        first, second = place[picture, before], place[picture, shape]
        both = (first > 0) & (second > 0)
        scores = self.relation(self.relation_norm(streams[middle][where][both]))
        target = _relation(first[both] - 1, second[both] - 1)
        # A batch may contain no pair at all.
        loss = loss + F.cross_entropy(scores, target, reduction="sum") / max(1, len(target))
        right = (scores.argmax(-1) == target).float().mean()
        return loss, {"facts": known.float().mean().item(), "relation": right.item()}


def _named_before(named: Tensor, segments: Tensor) -> Tensor:
    """The shape named before each position by the same question, (B, S); 0 if none."""
    indices = torch.arange(named.shape[1]).expand_as(named)
    last = torch.where(named > 0, indices, 0).cummax(1).values.roll(1, dims=1)
    same = segments.gather(1, last) == segments
    return named.gather(1, last) * same


def _relation(first: Tensor, second: Tensor) -> Tensor:
    """Nine classes: left, same or right column times above, same or below."""
    columns, rows = first % 2 - second % 2, first // 2 - second // 2
    return 3 * (rows + 1) + columns + 1
