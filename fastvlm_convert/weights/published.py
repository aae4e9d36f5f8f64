"""Dimensions of the models that Apple published: apple/FastVLM-0.5B, -1.5B and -7B."""

from typing import Final

from fastvlm_convert.weights.model_config import DecoderConfig, ModelConfig, StageConfig, VisionConfig

WIDTHS, DEPTHS = (96, 192, 384, 768, 1536), (2, 12, 24, 4, 2)
FEATURES: Final = 3072

# hidden, layers, query heads, KV heads, MLP, rows of the table, tied
DECODERS: Final = {
    "0.5b": (896, 24, 14, 2, 4864, 151_936, True),
    "1.5b": (1536, 28, 12, 2, 8960, 151_936, True),
    "7b": (3584, 28, 28, 4, 18_944, 152_064, False),
}


def published_config(size: str, num_layers: int | None = None) -> ModelConfig:
    """Dimensions of a published model, optionally with fewer decoder layers.

    Args:
        size: One of `DECODERS`.
        num_layers: Decoder layers, all by default.
    """
    hidden, layers, heads, kv_heads, mlp, rows, tied = DECODERS[size]
    stages = tuple(
        StageConfig("attention" if s > 2 else "conv", width, depth, 4 * width, s > 2)
        for s, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True))
    )
    decoder = DecoderConfig(
        hidden_size=hidden,
        num_layers=num_layers or layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=mlp,
        vocab_size=rows,
        embed_rows=rows,
        tied=tied,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=32_768,
    )
    return ModelConfig(VisionConfig(1024, WIDTHS[0], stages, FEATURES // 16, FEATURES), hidden, decoder)
