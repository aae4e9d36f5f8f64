"""FastVLM over the weights of a bundle's `mlx/` folder, operation by operation as mlx-vlm runs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import mlx.core as mx
import mlx.nn as nn

from fastvlm_convert.errors import BundleError, shortened
from fastvlm_convert.io_names import VISION_HEAD_DIM, VISION_NORM_EPS
from fastvlm_convert.runtime.contract import AGAIN

_VISION: Final = "vision_tower.vision_model"
_LANGUAGE: Final = "language_model.model"
_PARTS: Final = ("weight", "scales", "biases")  # of a matrix of integers

Groups = tuple[int, int]  # size and bits


@dataclass(frozen=True)
class Decoder:
    """What config.json says of the language model.

    Attributes:
        hidden_size: Width of the residual stream.
        num_hidden_layers: Layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        rms_norm_eps: Epsilon of every RMSNorm.
        rope_theta: Base of the rotary positions.
        tie_word_embeddings: Whether head and embedding are one table.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        sizes = (self.hidden_size, self.num_hidden_layers, self.num_attention_heads, self.num_key_value_heads)
        if min(sizes) < 1 or self.hidden_size % self.num_attention_heads:
            raise BundleError(f"the decoder's sizes {sizes} are impossible", hint=AGAIN)


class Weights:
    """The arrays of a file, and the layers that read them.

    Args:
        arrays: By name.
        groups: Groups of the integers of a module.
    """

    def __init__(self, arrays: Mapping[str, mx.array], groups: Callable[[str], Groups]) -> None:
        self._arrays = arrays
        self._groups = groups

    def has(self, name: str) -> bool:
        """Whether there is such an array."""
        return name in self._arrays

    def __getitem__(self, name: str) -> mx.array:
        if name not in self._arrays:
            raise BundleError(f"the MLX weights lack '{shortened(name, 100)}'", hint=AGAIN)
        return self._arrays[name]

    def linear(self, name: str, x: mx.array) -> mx.array:
        """[..., columns] -> [..., rows]."""
        if self.has(f"{name}.scales"):
            size, bits = self._groups(name)
            q, scales, biases = (self[f"{name}.{part}"] for part in _PARTS)
            x = mx.quantized_matmul(x, q, scales, biases, transpose=True, group_size=size, bits=bits)
        else:
            x = x @ self[f"{name}.weight"].T
        return x + self[f"{name}.bias"] if self.has(f"{name}.bias") else x

    def rows(self, name: str, ids: mx.array) -> mx.array:
        """Rows of a table."""
        if not self.has(f"{name}.scales"):
            return self[f"{name}.weight"][ids]
        size, bits = self._groups(name)
        q, scales, biases = (self[f"{name}.{part}"][ids] for part in _PARTS)
        return mx.dequantize(q, scales, biases, group_size=size, bits=bits)

    def conv(self, name: str, x: mx.array, stride: int = 1) -> mx.array:
        """[1, H, W, channels]; padded so that only the stride shrinks it."""
        kernel = self[f"{name}.weight"]
        channels, inside = x.shape[-1], kernel.shape[-1]
        x = mx.conv2d(x, kernel, stride, kernel.shape[1] // 2, groups=channels // max(1, inside))
        return x + self[f"{name}.bias"] if self.has(f"{name}.bias") else x


def encode(weights: Weights, pixels: mx.array) -> mx.array:
    """[1, H, W, 3] -> projected image tokens [tokens, hidden]."""
    stem = f"{_VISION}.patch_embed.blocks"
    x = pixels.astype(weights[f"{stem}.0.reparam_conv.weight"].dtype)
    for i, stride in enumerate((2, 2, 1)):
        x = nn.gelu(weights.conv(f"{stem}.{i}.reparam_conv", x, stride))
    place = 0
    while (kind := _kind(weights, f"{_VISION}.network.{place}")) is not None:
        x = kind(weights, f"{_VISION}.network.{place}", x)
        place += 1
    x = weights.conv(f"{_VISION}.conv_exp.reparam_conv", x)
    gate = weights.conv(f"{_VISION}.conv_exp.se.reduce", x.mean(axis=(1, 2), keepdims=True))
    gate = weights.conv(f"{_VISION}.conv_exp.se.expand", nn.relu(gate))
    x = nn.gelu(x * mx.sigmoid(gate))
    x = x.reshape(-1, x.shape[-1])
    return weights.linear("mm_projector.2", nn.gelu(weights.linear("mm_projector.0", x)))


def embed(weights: Weights, ids: mx.array) -> mx.array:
    """Token ids [n] -> [n, hidden]."""
    return weights.rows(f"{_LANGUAGE}.embed_tokens", ids)


def _kind(weights: Weights, name: str) -> Callable[[Weights, str, mx.array], mx.array] | None:
    """What stands at a place of the encoder's list; None behind its end."""
    if weights.has(f"{name}.proj.0.lkb_reparam.weight"):
        return _downsample
    if weights.has(f"{name}.reparam_conv.weight"):
        return _position
    return _stage if weights.has(f"{name}.0.convffn.fc1.weight") else None


def _downsample(weights: Weights, name: str, x: mx.array) -> mx.array:
    x = nn.gelu(weights.conv(f"{name}.proj.0.lkb_reparam", x, 2))
    return nn.gelu(weights.conv(f"{name}.proj.1.reparam_conv", x))


def _position(weights: Weights, name: str, x: mx.array) -> mx.array:
    return weights.conv(f"{name}.reparam_conv", x)


def _stage(weights: Weights, name: str, x: mx.array) -> mx.array:
    b = 0
    while weights.has(f"{name}.{b}.convffn.fc1.weight"):
        block = f"{name}.{b}"
        if weights.has(f"{block}.token_mixer.reparam_conv.weight"):
            x = weights.conv(f"{block}.token_mixer.reparam_conv", x)
            x = x + weights[f"{block}.layer_scale"] * _feed_forward(weights, f"{block}.convffn", x)
        else:
            x = x + weights[f"{block}.layer_scale_1"] * _mixed(weights, block, x)
            x = x + weights[f"{block}.layer_scale_2"] * _feed_forward(weights, f"{block}.convffn", x)
        b += 1
    return x


def _feed_forward(weights: Weights, name: str, x: mx.array) -> mx.array:
    norm = f"{name}.conv.bn"
    x = weights.conv(f"{name}.conv.conv", x) - weights[f"{norm}.running_mean"]
    x = x * mx.rsqrt(weights[f"{norm}.running_var"] + VISION_NORM_EPS)
    x = x * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
    return weights.conv(f"{name}.fc2", nn.gelu(weights.conv(f"{name}.fc1", x)))


def _mixed(weights: Weights, block: str, x: mx.array) -> mx.array:
    shape, width = x.shape, x.shape[-1]
    centered = x - x.mean(-1, keepdims=True)
    scale = mx.rsqrt(mx.square(centered).mean(-1, keepdims=True) + VISION_NORM_EPS)
    x = weights[f"{block}.norm.weight"] * (centered * scale) + weights[f"{block}.norm.bias"]
    packed = weights.linear(f"{block}.token_mixer.qkv", x.reshape(1, -1, width))
    heads = packed.reshape(1, -1, 3, width // VISION_HEAD_DIM, VISION_HEAD_DIM).transpose(2, 0, 3, 1, 4)
    mixed = mx.fast.scaled_dot_product_attention(*heads, scale=VISION_HEAD_DIM**-0.5)
    mixed = mixed.transpose(0, 2, 1, 3).reshape(1, -1, width)
    return weights.linear(f"{block}.token_mixer.proj", mixed).reshape(shape)


class Cache:
    """Keys and values of every layer, [1, heads, length, head_dim] each."""

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, tuple[mx.array, mx.array]] = {}

    def skip_to(self, position: int) -> None:
        """Zeros up to a position."""
        gap = position - self.length
        pad = [(0, 0), (0, 0), (0, gap), (0, 0)]
        self._layers = {i: (mx.pad(k, pad), mx.pad(v, pad)) for i, (k, v) in self._layers.items()}
        self.length = position

    def append(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Everything so far, with what is new at the end."""
        if layer in self._layers:
            old = self._layers[layer]
            keys, values = (mx.concatenate(pair, 2) for pair in zip(old, (keys, values), strict=True))
        self._layers[layer] = keys, values
        return keys, values


def decode(weights: Weights, decoder: Decoder, x: mx.array, cache: Cache) -> mx.array:
    """Embeddings [n, hidden], appended to the cache -> logits of the last position, [vocab]."""
    x = x[None]
    for i in range(decoder.num_hidden_layers):
        layer = f"{_LANGUAGE}.layers.{i}"
        normed = mx.fast.rms_norm(x, weights[f"{layer}.input_layernorm.weight"], decoder.rms_norm_eps)
        x = x + _attention(weights, decoder, i, normed, cache)
        normed = mx.fast.rms_norm(
            x, weights[f"{layer}.post_attention_layernorm.weight"], decoder.rms_norm_eps
        )
        gated = nn.silu(weights.linear(f"{layer}.mlp.gate_proj", normed))
        x = x + weights.linear(
            f"{layer}.mlp.down_proj", gated * weights.linear(f"{layer}.mlp.up_proj", normed)
        )
    cache.length += x.shape[1]
    last = mx.fast.rms_norm(x[:, -1], weights[f"{_LANGUAGE}.norm.weight"], decoder.rms_norm_eps)
    tied = decoder.tie_word_embeddings
    return weights.linear(f"{_LANGUAGE}.embed_tokens" if tied else "language_model.lm_head", last)[0]


def _attention(weights: Weights, decoder: Decoder, i: int, x: mx.array, cache: Cache) -> mx.array:
    name, width = f"{_LANGUAGE}.layers.{i}.self_attn", decoder.hidden_size // decoder.num_attention_heads

    def heads(proj: str, count: int) -> mx.array:
        return weights.linear(f"{name}.{proj}", x).reshape(*x.shape[:2], count, width).transpose(0, 2, 1, 3)

    def rotated(x: mx.array) -> mx.array:
        return mx.fast.rope(
            x, width, traditional=False, base=decoder.rope_theta, scale=1.0, offset=cache.length
        )

    query = rotated(heads("q_proj", decoder.num_attention_heads))
    key = rotated(heads("k_proj", decoder.num_key_value_heads))
    keys, values = cache.append(i, key, heads("v_proj", decoder.num_key_value_heads))
    mask = "causal" if x.shape[1] > 1 else None
    mixed = mx.fast.scaled_dot_product_attention(query, keys, values, scale=width**-0.5, mask=mask)
    return weights.linear(f"{name}.o_proj", mixed.transpose(0, 2, 1, 3).reshape(1, x.shape[1], -1))
