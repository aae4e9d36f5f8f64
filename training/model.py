"""Everything that trains: the network, the dense heads and the symbols, and their losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from data import Batch
from evaluate import embed_row
from labels import FIELDS
from network import Decoder, NetworkConfig, Projector, Vision
from symbols import DenseHeads, FactHeads, Fields, SymbolEncoder
from text import IGNORE, Packer
from tokenizers import Tokenizer
from torch import Tensor, nn

Losses = tuple[Tensor, dict[str, float]]

_SYMBOL_NOISE = 0.05


class AnsweringModel(nn.Module):
    """A network with its training aids (`heads`, `symbols`)."""

    def __init__(self, config: NetworkConfig, tokenizer: Tokenizer, fields: Fields) -> None:
        """Build everything from scratch."""
        super().__init__()
        self.vision = Vision(config).to(memory_format=torch.channels_last)
        self.projector = Projector(config)
        self.decoder = Decoder(config)
        self.heads = DenseHeads(config.feature_size, fields)
        self.symbols = SymbolEncoder(tokenizer, config.vocab_size, config.hidden, fields)
        self._system_length = len(Packer(tokenizer).system)

    def symbol_tokens(self, batch: Batch) -> Tensor:
        """Image tokens (B, N, D) as spelled by the dense labels."""
        return self.symbols(batch.labels, self.decoder.embed_tokens.weight)

    def image_tokens(self, batch: Batch) -> Tensor:
        """Image tokens (B, N, D) as the network sees the pictures."""
        return self.projector(self.vision(batch.pixels))

    def answer_loss(self, batch: Batch, image_tokens: Tensor) -> tuple[Losses, list[Tensor]]:
        """Cross-entropy of the answers, and the residual stream (B, S, D) after every layer."""
        embeds = embed_row(self.decoder, batch, image_tokens, self._system_length)
        streams = self.decoder.residuals(embeds, batch.positions, batch.mask)
        hidden = self.decoder.norm(streams[-1])
        asked = batch.targets != IGNORE
        logits = self.decoder.logits(hidden[asked])
        targets = batch.targets[asked]
        loss = F.cross_entropy(logits, targets)
        right = (logits.detach().argmax(-1) == targets).float().mean().item()
        return (loss, {"text": loss.item(), "token": right}), streams


class DemoModel(AnsweringModel):
    """The demo network with its training aids (`heads`, `symbols`, `facts`)."""

    def __init__(self, config: NetworkConfig, tokenizer: Tokenizer) -> None:
        """Build everything from scratch."""
        super().__init__(config, tokenizer, FIELDS)
        self.facts = FactHeads(tokenizer, config.vocab_size, config.hidden)

    def text_loss(self, batch: Batch, image_tokens: Tensor, facts: float = 0.0) -> Losses:
        """Cross-entropy of the answers, plus `facts` times the loss of the fact heads."""
        (loss, metrics), streams = self.answer_loss(batch, image_tokens)
        if facts:
            fact_loss, fact_metrics = self.facts(streams, batch)
            loss = loss + facts * fact_loss
            metrics |= fact_metrics
        return loss, metrics

    def vision_loss(self, batch: Batch) -> Losses:
        """Dense labels only."""
        losses, right = self.heads.losses(self.vision(batch.pixels), batch.labels)
        return losses.sum(), _dense_metrics(losses, right)

    def decoder_loss(self, batch: Batch) -> Losses:
        """Answers from symbols."""
        tokens = self.symbol_tokens(batch)
        return self.text_loss(batch, tokens + _SYMBOL_NOISE * torch.randn_like(tokens), facts=0.3)

    def projector_loss(self, batch: Batch) -> Losses:
        """Distance of the projected features from the symbols; nothing else learns."""
        with torch.no_grad():
            features, symbols = self.vision(batch.pixels), self.symbol_tokens(batch)
        loss = relative_distance(self.projector(features), symbols)
        return loss, {"distance": loss.item()}

    def joint_loss(self, batch: Batch, aids: float) -> Losses:
        """Answers from pictures, with the training aids weighted by `aids`."""
        features = self.vision(batch.pixels)
        tokens = self.projector(features)
        text, metrics = self.text_loss(batch, tokens, facts=0.3 * aids)
        losses, right = self.heads.losses(features, batch.labels)
        distance = relative_distance(tokens, self.symbol_tokens(batch).detach())
        metrics |= {"distance": distance.item()} | _dense_metrics(losses, right)
        return text + aids * (0.3 * losses.sum() + distance), metrics


def relative_distance(tokens: Tensor, symbols: Tensor) -> Tensor:
    """Mean squared error, relative to the size of the symbols."""
    return F.mse_loss(tokens, symbols) / symbols.square().mean()


def _dense_metrics(losses: Tensor, right: Tensor) -> dict[str, float]:
    return {"dense": losses.sum().item()} | dict(zip(FIELDS, right.tolist(), strict=True))
