"""Stand-ins for image tokens, built from dense labels: the decoder learns before it sees.

The rows of a label are the embeddings of its word plus a learned offset, so that image tokens
speak the decoder's language from the start.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from labels import FIELD_OFFSETS, FIELDS, FIRST_TOKENS, NUM_LABELS
from tokenizers import Tokenizer
from torch import Tensor, nn

from fastvlm_convert.demo.scene import COLORS, PLACES, SHAPES, SIZES


class SymbolEncoder(nn.Module):
    """Dense labels (B, 16, fields) to image token embeddings (B, 16, D)."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, hidden: int) -> None:
        """Find the words of all labels."""
        super().__init__()
        words = torch.zeros(NUM_LABELS, vocab_size)
        for offset, (field, values) in zip(FIELD_OFFSETS, FIELDS.items(), strict=True):
            for index, value in enumerate(values):
                text = value if field.startswith("slot") or not value else " " + value
                for token in tokenizer.encode(text).ids:
                    words[offset + index, token] = 1.0
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("offsets", torch.tensor(FIELD_OFFSETS), persistent=False)
        self.delta = nn.Parameter(torch.randn(NUM_LABELS, hidden) * 0.7 * hidden**-0.5)

    def forward(self, labels: Tensor, embedding: Tensor) -> Tensor:
        """Sum the rows of all labels, given the word embedding (V, D)."""
        rows = self.words @ embedding + self.delta
        return F.embedding(labels + self.offsets, rows).sum(2)


class DenseHeads(nn.Linear):
    """Linear read-outs of all labels from vision features; thrown away after training."""

    def __init__(self, feature_size: int) -> None:
        """One output per label."""
        super().__init__(feature_size, NUM_LABELS)

    def losses(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and accuracy per field (fields,), for features (B, N, C)."""
        losses, right = [], []
        sizes = [len(values) for values in FIELDS.values()]
        for index, logits in enumerate(self(features).split(sizes, dim=-1)):
            target = labels[:, :, index]
            losses.append(F.cross_entropy(logits.flatten(0, 1), target.flatten()))
            right.append((logits.detach().argmax(-1) == target).float().mean())
        return torch.stack(losses), torch.stack(right)


class FactHeads(nn.Module):
    """Read-outs of a shape's facts wherever the text names it; thrown away after training.

    Finding a shape and reporting on it are useless alone, so neither begins by itself. Asking for the
    facts at the shape's own name, halfway through the decoder, teaches the first of the two.
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

    def forward(self, hidden: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of color, size and place of all named shapes (0 where absent).

        Args:
            hidden: Residual stream, (B, S, D).
            ids: Token ids, (B, S).
            labels: Dense labels, (B, 16, fields).
        """
        named = self.shape_of_token[ids]
        picture, _ = where = named.nonzero(as_tuple=True)
        cells = labels[:, FIRST_TOKENS][picture]
        found = cells[:, :, 0] == named[where][:, None]
        place = (found * torch.arange(1, 1 + len(PLACES))).sum(1)
        color, size = ((found * cells[:, :, field]).sum(1) for field in (1, 2))
        logits = self.linear(self.norm(hidden[where])).split(self._sizes, dim=-1)
        loss, right = hidden.new_zeros(()), torch.ones_like(place, dtype=torch.bool)
        for scores, target in zip(logits, (color, size, place), strict=True):
            loss = loss + F.cross_entropy(scores, target)
            right = right & (scores.argmax(-1) == target)
        return loss, right.float().mean()
