"""What the network is: dimensions, read off the tensors."""

from dataclasses import dataclass, replace
from typing import Literal

from fastvlm_convert.io_names import VISION_HEAD_DIM, num_image_tokens


@dataclass(frozen=True)
class StageConfig:
    """One stage of the encoder: blocks of equal width after an optional downsampling.

    Attributes:
        mixer: `conv` for RepMixer blocks, `attention` for self-attention blocks.
        width: Channels.
        depth: Blocks.
        ffn_width: Hidden channels of the convolutional feed-forward network.
        has_position: Whether a convolutional position encoding stands before the blocks.
    """

    mixer: Literal["conv", "attention"]
    width: int
    depth: int
    ffn_width: int
    has_position: bool

    @property
    def num_heads(self) -> int:
        """Attention heads, each `VISION_HEAD_DIM` wide."""
        return self.width // VISION_HEAD_DIM


@dataclass(frozen=True)
class VisionConfig:
    """The FastViTHD encoder.

    Attributes:
        image_size: Edge of the square input in pixels.
        stem_width: Channels of the patch embedding.
        stages: The stages in order.
        squeeze_width: Hidden channels of the final squeeze-and-excitation block.
        output_width: Channels of the features, one vector per image token.
        rescale_factor: What 8-bit values are multiplied by before they enter.
        image_mean: Subtracted then, by channel.
        image_std: What the result is divided by, by channel.
    """

    image_size: int
    stem_width: int
    stages: tuple[StageConfig, ...]
    squeeze_width: int
    output_width: int
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    image_std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def num_image_tokens(self) -> int:
        """Image tokens per image."""
        return num_image_tokens(self.image_size)


@dataclass(frozen=True)
class DecoderConfig:
    """The Qwen2 decoder.

    Attributes:
        hidden_size: Width of the residual stream.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads, each shared by a group of query heads.
        head_dim: Width of one head.
        intermediate_size: Hidden width of the MLP.
        vocab_size: Rows of the output head.
        embed_rows: Rows of the embedding table.
        tied: Whether head and embedding are one table.
        rms_norm_eps: Epsilon of every RMSNorm.
        rope_theta: Base of the rotary position embedding.
        max_position_embeddings: Positions the model was trained for.
        residual_shift: The residual stream is divided by 2 to this power (see `weights.rescale`).
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    embed_rows: int
    tied: bool
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    residual_shift: int = 0

    @property
    def residual_scale(self) -> float:
        """What embeddings are multiplied by where they enter the residual stream."""
        return 2.0**-self.residual_shift

    @property
    def norm_eps(self) -> float:
        """Epsilon of every RMSNorm on the scaled stream: their results stay the same."""
        return self.rms_norm_eps * self.residual_scale**2


@dataclass(frozen=True)
class ModelConfig:
    """A whole FastVLM.

    Attributes:
        vision: The image encoder.
        projector_width: Hidden width of the two-layer projector.
        decoder: The language model.
    """

    vision: VisionConfig
    projector_width: int
    decoder: DecoderConfig


def at_image_size(config: ModelConfig, image_size: int) -> ModelConfig:
    """The same network for another input size: it is convolutional, and its attention has no fixed length."""
    return replace(config, vision=replace(config.vision, image_size=image_size))
