"""Stand-ins for image tokens, built from dense labels: the decoder learns before it sees.

The rows of a label are the embeddings of its word plus a learned offset, so that image tokens
speak the decoder's language from the start.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from labels import FIELD_OFFSETS, FIELDS, NUM_LABELS
from tokenizers import Tokenizer
from torch import Tensor, nn


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
