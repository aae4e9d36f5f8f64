"""Qwen2, the language model (arXiv:2407.10671): grouped-query attention, rotary positions, SwiGLU, RMSNorm.

Shapes: B batch, T tokens of this call, P tokens already in the cache, H hidden, D head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastvlm_convert.weights.model_config import DecoderConfig


@dataclass
class KVCache:
    """Keys and values of one layer, each [B, num_kv_heads, context, D], filled up to `length`."""

    key: Tensor
    value: Tensor
    length: int = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions; returns all P + T keys and values."""
        end = self.length + key.shape[2]
        self.key[:, :, self.length : end] = key
        self.value[:, :, self.length : end] = value
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]

    def mask(self, tokens: int) -> Tensor:
        """Which positions each of T new ones sees: the P stored ones and those up to itself; [T, P + T]."""
        return torch.ones(tokens, self.length + tokens, dtype=torch.bool).tril(self.length)

    def angles(self, config: DecoderConfig, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines by which T new positions are rotated, [T, D / 2] each."""
        cos, sin = rotary_table(config, self.length + tokens)
        return cos[self.length :], sin[self.length :]


class RMSNorm(nn.Module):
    """Scale to unit root mean square, then by a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def rotary_table(config: DecoderConfig, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (arXiv:2104.09864), each [positions, D / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), 1.0 / config.rope_theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of x [B, heads, T, D] by angles [T, D / 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Attention(nn.Module):
    """Causal attention in which groups of query heads share a key and value head; [B, T, H] -> [B, T, H]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query)
        self.k_proj = nn.Linear(config.hidden_size, key)
        self.v_proj = nn.Linear(config.hidden_size, key)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            proj(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = cache.mask(tokens)
        keys, values = cache.append(rotate(k, cos, sin), v)
        mixed = functional.scaled_dot_product_attention(
            rotate(q, cos, sin), keys, values, attn_mask=mask, enable_gqa=True
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202); [B, T, H] -> [B, T, H]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each on the normalized residual stream and added to it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """The decoder with its embedding table and head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.embed_rows, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def new_cache(self, context: int) -> list[KVCache]:
        """An empty cache of one sequence."""
        shape = (1, self.config.num_kv_heads, context, self.config.head_dim)
        return [KVCache(torch.zeros(shape), torch.zeros(shape)) for _ in self.layers]

    def forward(self, inputs_embeds: Tensor, cache: Sequence[KVCache], last_only: bool = False) -> Tensor:
        """Append tokens to the cache.

        Args:
            inputs_embeds: [B, T, H].
            cache: One entry a layer; grows by T positions.
            last_only: Compute logits of the last position alone; those of a whole prompt take a quarter of
                its time at 0.5B.

        Returns:
            Logits of every position of this call, [B, T, vocab], or of the last, [B, 1, vocab].
        """
        hidden = self.hidden(inputs_embeds, cache)
        return self.logits(hidden[:, -1:] if last_only else hidden)

    def hidden(self, inputs_embeds: Tensor, cache: Sequence[KVCache]) -> Tensor:
        """The same up to the residual stream, [B, T, H]: logits of few positions are cheaper than of all."""
        cos, sin = cache[0].angles(self.config, inputs_embeds.shape[1])
        x = inputs_embeds * self.config.residual_scale
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, cos, sin, layer_cache)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Residual stream [..., H] -> logits [..., vocab]."""
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return functional.linear(self.norm(hidden), head)
