"""Exact changes of the decoder's weights that keep float16 within its range.

Whole rows are multiplied by powers of two, so nothing is rounded, and integers found for the changed rows are
those of the unchanged ones with shifted scales. Only what leaves float16's normal numbers (below 6e-5) loses
bits: the quantizer judges scales as they are stored, so it accounts for that.

Residual stream: with s = 2^-n everything that is added to it is multiplied by s (the rows of `o_proj` and
`down_proj`; the embeddings where they enter), and RMSNorm divides s out again once its epsilon is eps s^2.

Keys and queries: a score is a sum over rotary pairs (i, i + D / 2), and rotating a pair commutes with
scaling it. So a pair of key rows may be divided by 2^e where the same rows of all its query heads are
multiplied by it.
"""

from dataclasses import replace
from functools import cache

import numpy as np

from fastvlm_convert.errors import RecipeError
from fastvlm_convert.recipe_settings import RepairSettings
from fastvlm_convert.weights.fold import scaled_rows
from fastvlm_convert.weights.model_config import DecoderConfig, ModelConfig
from fastvlm_convert.weights.source import Weight, WeightSource
from fastvlm_convert.weights.storage import checked

_MAX_EXPONENT = 8  # beyond it, rows of usual size would leave float16's normal numbers


def repaired_config(config: ModelConfig, repairs: RepairSettings) -> ModelConfig:
    """The network that repaired weights belong to.

    Raises:
        RecipeError: A repair is for a layer that the decoder has not.
    """
    layers = config.decoder.num_layers
    for name in ("rescaled_keys", "float32_scores", "separate_key_bias"):
        for layer in getattr(repairs, name):
            if not 0 <= layer < layers:
                raise RecipeError(
                    f"repairs.{name} names layer {layer}, but the decoder's layers are 0 to {layers - 1}"
                )
    return replace(config, decoder=replace(config.decoder, residual_shift=repairs.residual_shift))


def fp16_safe(weights: WeightSource, decoder: DecoderConfig, repairs: RepairSettings) -> dict[str, Weight]:
    """A view with the repairs that are changes of weights; the others change the lowering.

    Args:
        weights: Canonical names, folded, not quantized.
        decoder: Dimensions.
        repairs: What to do; the model that runs the view needs `repaired_config`.
    """
    safe = dict(weights)
    for layer in repairs.rescaled_keys:
        _rescale_keys(safe, decoder, f"decoder.layers.{layer}")
    if repairs.residual_shift:
        shift = np.full(decoder.hidden_size, 2.0**-repairs.residual_shift)
        for layer in range(decoder.num_layers):
            for module in ("self_attn.o_proj", "mlp.down_proj"):
                name = f"decoder.layers.{layer}.{module}.weight"
                safe[name] = scaled_rows(weights[name], lambda: shift)
    return checked(safe, weights, "applying the repairs")


def _rescale_keys(weights: dict[str, Weight], decoder: DecoderConfig, layer: str) -> None:
    before = dict(weights)

    @cache
    def exponents() -> np.ndarray:
        return key_exponents(before, decoder, layer)

    def key_rows() -> np.ndarray:
        return np.tile(np.ldexp(1.0, -exponents()), 2).reshape(-1)

    def query_rows() -> np.ndarray:
        group = decoder.num_heads // decoder.num_kv_heads
        return np.repeat(np.tile(np.ldexp(1.0, exponents()), 2), group, axis=0).reshape(-1)

    for proj, rows in (("k", key_rows), ("q", query_rows)):
        for part in ("weight", "bias"):
            name = f"{layer}.self_attn.{proj}_proj.{part}"
            weights[name] = scaled_rows(before[name], rows)


def key_exponents(weights: WeightSource, decoder: DecoderConfig, layer: str) -> np.ndarray:
    """Powers of two that make the keys of a layer as large as its queries.

    Sizes are root mean squares over normalized inputs, from the weights alone; of the query heads that share
    a key head the largest counts.

    Args:
        weights: Canonical names.
        decoder: Dimensions.
        layer: Name of the layer.

    Returns:
        int [num_kv_heads, head_dim / 2], positive where keys are divided.
    """
    gain = weights[f"{layer}.input_layernorm.weight"].array().astype(np.float64)

    def sizes(proj: str, heads: int) -> np.ndarray:
        rows = weights[f"{layer}.self_attn.{proj}_proj.weight"].array() * gain
        bias = weights[f"{layer}.self_attn.{proj}_proj.bias"].array().astype(np.float64)
        squares = np.square(rows).sum(1) + np.square(bias)
        return np.sqrt(squares.reshape(heads, 2, decoder.head_dim // 2).sum(1))

    keys = sizes("k", decoder.num_kv_heads)
    queries = sizes("q", decoder.num_heads).reshape(decoder.num_kv_heads, -1, keys.shape[1]).max(1)
    unused = (keys == 0) | (queries == 0)
    ratio = np.where(unused, 1, keys) / np.where(unused, 1, queries)
    # Half the logarithm, rounded; ratio = m 2^k with m in [1/2, 1). Processors disagree on log2's last bit.
    return np.clip(np.frexp(ratio)[1] // 2, -_MAX_EXPONENT, _MAX_EXPONENT)
