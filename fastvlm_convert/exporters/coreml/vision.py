"""Lower the image encoder and the projector: FastViTHD with BatchNorm and LayerScale folded."""

from typing import Final

import numpy as np

from fastvlm_convert.exporters.coreml.graph import Graph, scalar
from fastvlm_convert.exporters.coreml.ops import attention, conv, gelu, linear
from fastvlm_convert.exporters.coreml.support import AUTO_COMPUTE
from fastvlm_convert.exporters.coreml.values import Value
from fastvlm_convert.exporters.coreml.weights import dense
from fastvlm_convert.io_names import (
    IMAGE,
    IMAGE_FEATURES,
    PIXEL_VALUES,
    VISION_HEAD_DIM,
    VISION_NORM_EPS,
    vision_op,
)
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import ModelConfig, StageConfig, VisionConfig

APPLE_INPUT: Final = "images"  # what Apple's app calls the input of its vision package


def build_vision(graph: Graph, config: ModelConfig, weights: MixedSource, recipe: Recipe) -> None:
    """Add encoder and projector to a graph.

    Args:
        graph: An empty graph.
        config: Dimensions; its image size is the graph's.
        weights: Canonical names, folded.
        recipe: Whether it takes a picture, which it scales and normalizes, or pixel values. The latter and
            the image tokens, [1, tokens, hidden], have the decoder's dtype.
    """
    size, border = config.vision.image_size, recipe.decoder.on(AUTO_COMPUTE).compute
    shape = (1, 3, size, size)
    if recipe.coreml.image_input == "image":
        # Core ML hands pictures over as float32, 0..255.
        image = graph.input(IMAGE, "float32", shape, kind="image")
        x = _normalized(graph, image, config.vision, config.vision.rescale_factor)
    else:
        x = graph.input(PIXEL_VALUES, border, shape)
    builder = _Builder(graph, weights, is_fused=recipe.coreml.attention == "fused")
    projected = builder.project(builder.encode(x, config))
    if graph.dtype("projector_fc2") == border:
        graph.output(graph.plain_op("identity", IMAGE_FEATURES, x=projected))
    else:
        graph.output(graph.cast(projected, border, IMAGE_FEATURES))


def build_apple_vision(graph: Graph, config: ModelConfig, weights: MixedSource) -> None:
    """Add what Apple's app loads: `images` [1, 3, S, S] -> `image_features` [1, tokens, output_width]."""
    size = config.vision.image_size
    x = graph.input(APPLE_INPUT, "float32", (1, 3, size, size))
    # The app hands over RGB in 0..1.
    if (factor := 255 * config.vision.rescale_factor) != 1 or _is_normalized(config.vision):
        x = _normalized(graph, x, config.vision, factor)
    features = _Builder(graph, weights, is_fused=False).encode(x, config)
    graph.output(graph.plain_op("identity", IMAGE_FEATURES, x=features))


def _is_normalized(vision: VisionConfig) -> bool:
    return any(vision.image_mean) or vision.image_std != (1.0, 1.0, 1.0)


def _normalized(graph: Graph, x: Value, vision: VisionConfig, factor: float) -> Value:
    """(x * factor - mean) / std as one product and one sum by channel; without the sum where mean is 0."""
    if not _is_normalized(vision):
        return graph.plain_op("mul", "pixels", x=x, y=scalar("float32", factor))
    mean, std = (np.array(v)[None, :, None, None] for v in (vision.image_mean, vision.image_std))
    scale = graph.constant("pixel_scale", mean.shape, lambda: factor / std, "float32")
    offset = graph.constant("pixel_offset", mean.shape, lambda: -mean / std, "float32")
    scaled = graph.plain_op("mul", "pixels_scaled", x=x, y=scale)
    return graph.plain_op("add", "pixels", x=scaled, y=offset)


class _Builder:
    """Adds the blocks of the encoder; every method takes and returns a value."""

    def __init__(self, graph: Graph, weights: MixedSource, *, is_fused: bool) -> None:
        self.is_fused = is_fused
        self.graph = graph
        self.weights = weights

    def encode(self, x: Value, config: ModelConfig) -> Value:
        """Pixels [1, 3, S, S] -> features [1, tokens, output_width]."""
        vision = config.vision
        for i, (stride, groups) in enumerate(((2, 1), (2, vision.stem_width), (1, 1))):
            x = self.gelu(self.conv(f"stem_{i}", x, f"vision.stem.{i}", stride, groups))
        edge, width = vision.image_size // 4, vision.stem_width
        for s, stage in enumerate(vision.stages):
            if s:
                x, edge = self.downsample(x, s, width), edge // 2
            width = stage.width
            if stage.has_position:
                x = self.conv(f"s{s}_position", x, f"vision.stages.{s}.position", groups=width)
            for b in range(stage.depth):
                x = self.block(x, s, b, stage, edge)
        x = self.conv("final", x, "vision.final.conv", groups=width)
        x = self.gelu(self.squeeze_excite(x))
        return self.to_tokens("features", x, vision.output_width)

    def project(self, features: Value) -> Value:
        """Features -> projected image tokens [1, tokens, hidden]."""
        x = self.gelu(self.linear("projector_fc1", features, "projector.fc1"))
        return self.linear("projector_fc2", x, "projector.fc2")

    def downsample(self, x: Value, s: int, width: int) -> Value:
        prefix = f"vision.stages.{s}.downsample"
        x = self.gelu(self.conv(f"s{s}_down_0", x, f"{prefix}.0", 2, width))
        return self.gelu(self.conv(f"s{s}_down_1", x, f"{prefix}.1"))

    def block(self, x: Value, s: int, b: int, stage: StageConfig, edge: int) -> Value:
        prefix = f"vision.stages.{s}.blocks.{b}"
        if stage.mixer == "conv":
            x = self.conv(vision_op(s, b, "mixer"), x, f"{prefix}.mixer", groups=stage.width)
        else:
            mixed = self.attention(x, s, b, stage, edge)
            x = self.graph.op("add", vision_op(s, b, "attn_residual"), x=x, y=mixed)
        y = self.conv(vision_op(s, b, "ffn_conv"), x, f"{prefix}.ffn.conv", groups=stage.width)
        y = self.gelu(self.conv(vision_op(s, b, "fc1"), y, f"{prefix}.ffn.fc1"))
        y = self.conv(vision_op(s, b, "fc2"), y, f"{prefix}.ffn.fc2")
        return self.graph.op("add", vision_op(s, b, "residual"), x=x, y=y)

    def attention(self, x: Value, s: int, b: int, stage: StageConfig, edge: int) -> Value:
        graph, prefix, tokens = self.graph, f"vision.stages.{s}.blocks.{b}", edge * edge

        def op(part: str) -> str:
            return vision_op(s, b, part)

        dtype = graph.dtype(op("norm"))
        normed = graph.op(
            "layer_norm",
            op("norm"),
            x=self.to_tokens(op("tokens"), x, stage.width),
            axes=[-1],
            gamma=dense(graph, f"{op('norm')}_weight", [self.weights[f"{prefix}.norm.weight"]], dtype),
            beta=dense(graph, f"{op('norm')}_bias", [self.weights[f"{prefix}.norm.bias"]], dtype),
            epsilon=scalar(dtype, VISION_NORM_EPS),
        )
        packed = self.linear(op("qkv"), normed, f"{prefix}.attention.qkv")
        parts = graph.split_op("split", op("qkv_split"), x=packed, num_splits=3, axis=-1)
        shape = [1, tokens, stage.num_heads, VISION_HEAD_DIM]
        query, key, value = (self.heads(op(p), part, shape) for p, part in zip("qkv", parts, strict=True))
        mixed = attention(graph, op("attn"), (query, key, value), None, is_fused=self.is_fused)
        mixed = graph.plain_op("transpose", op("attn_transposed"), x=mixed, perm=[0, 2, 1, 3])
        mixed = graph.plain_op("reshape", op("attn_flat"), x=mixed, shape=[1, tokens, stage.width])
        mixed = self.linear(op("proj"), mixed, f"{prefix}.attention.proj")
        mixed = graph.plain_op("transpose", op("proj_nchw"), x=mixed, perm=[0, 2, 1])
        return graph.plain_op("reshape", op("mixed"), x=mixed, shape=[1, stage.width, edge, edge])

    def heads(self, name: str, x: Value, shape: list[int]) -> Value:
        """[1, tokens, width] -> [1, heads, tokens, head_dim], by way of `shape`."""
        split = self.graph.plain_op("reshape", f"{name}_heads", x=x, shape=shape)
        return self.graph.plain_op("transpose", f"{name}_transposed", x=split, perm=[0, 2, 1, 3])

    def squeeze_excite(self, x: Value) -> Value:
        graph = self.graph
        pooled = graph.op("reduce_mean", "se_pool", x=x, axes=[2, 3], keep_dims=True)
        gate = graph.op("relu", "se_relu", x=self.conv("se_reduce", pooled, "vision.final.se.reduce"))
        gate = graph.op("sigmoid", "se_gate", x=self.conv("se_expand", gate, "vision.final.se.expand"))
        return graph.op("mul", "se_scaled", x=x, y=gate)

    def to_tokens(self, name: str, x: Value, width: int) -> Value:
        """[1, C, H, W] -> [1, H * W, C]."""
        shape = [1, width, x.shape[2] * x.shape[3]]
        flat = self.graph.plain_op("reshape", f"{name}_flat", x=x, shape=shape)
        return self.graph.plain_op("transpose", name, x=flat, perm=[0, 2, 1])

    def conv(self, name: str, x: Value, layer: str, stride: int = 1, groups: int = 1) -> Value:
        weights = self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"]
        return conv(self.graph, name, x, weights, stride, groups)

    def linear(self, name: str, x: Value, layer: str) -> Value:
        bias = f"{layer}.bias"
        biases = [self.weights[bias]] if bias in self.weights else []
        return linear(self.graph, name, x, [self.weights[f"{layer}.weight"]], biases)

    def gelu(self, x: Value) -> Value:
        return gelu(self.graph, x)
