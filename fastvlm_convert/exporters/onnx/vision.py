"""Lower the image encoder and the projector: FastViTHD with BatchNorm and LayerScale folded."""

import numpy as np

from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.exporters.onnx.ops import conv, gelu, linear
from fastvlm_convert.exporters.onnx.pictures import prepare_pictures
from fastvlm_convert.exporters.onnx.weights import floats
from fastvlm_convert.io_names import (
    BATCH,
    HEIGHT,
    IMAGE_FEATURES,
    NUM_IMAGE_TOKENS,
    PIXEL_VALUES,
    VISION_HEAD_DIM,
    VISION_NORM_EPS,
    WIDTH,
    vision_op,
)
from fastvlm_convert.preprocess import ImageSettings
from fastvlm_convert.quantized.weight import MixedSource, float_weight
from fastvlm_convert.weights.model_config import ModelConfig, StageConfig


def build_vision(
    graph: Graph, config: ModelConfig, weights: MixedSource, images: ImageSettings | None
) -> None:
    """Add encoder and projector to a graph.

    Args:
        graph: An empty graph.
        config: Dimensions; its image size is the graph's.
        weights: Canonical names, folded.
        images: How the graph prepares pictures of any size; None where it is given prepared ones.
    """
    size, hidden = config.vision.image_size, config.decoder.hidden_size
    if images is None:
        x = graph.input(PIXEL_VALUES, "float32", [BATCH, 3, size, size])
    else:
        pictures = graph.input(PIXEL_VALUES, "float32", [BATCH, 3, HEIGHT, WIDTH])
        x = prepare_pictures(graph, pictures, images)
    if graph.compute != "float32":
        x = graph.cast(x, graph.compute, "pixels_cast")
    builder = _Builder(graph, weights)
    projected = builder.project(builder.encode(x, config))
    flat = graph.constant("flat_shape", np.array([-1, hidden], np.int64))
    # Rank 2: onnxruntime-genai passes [0, hidden] when a prompt has no image.
    if graph.compute == "float32":
        graph.op("Reshape", IMAGE_FEATURES, [projected, flat])
    else:
        graph.cast(graph.op("Reshape", "flat_features", [projected, flat]), "float32", IMAGE_FEATURES)
    graph.output(IMAGE_FEATURES, "float32", [NUM_IMAGE_TOKENS, hidden])


class _Builder:
    """Adds the blocks of the encoder; every method takes and returns the name of a value."""

    def __init__(self, graph: Graph, weights: MixedSource) -> None:
        self.graph = graph
        self.weights = weights

    def encode(self, x: str, config: ModelConfig) -> str:
        """Pixels [B, 3, S, S] -> features [B, tokens, output_width]."""
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

    def project(self, features: str) -> str:
        """Features -> projected image tokens [B, tokens, hidden]."""
        x = self.gelu(self.linear("projector_fc1", features, "projector.fc1"))
        return self.linear("projector_fc2", x, "projector.fc2")

    def downsample(self, x: str, s: int, width: int) -> str:
        prefix = f"vision.stages.{s}.downsample"
        x = self.gelu(self.conv(f"s{s}_down_0", x, f"{prefix}.0", 2, width))
        return self.gelu(self.conv(f"s{s}_down_1", x, f"{prefix}.1"))

    def block(self, x: str, s: int, b: int, stage: StageConfig, edge: int) -> str:
        prefix = f"vision.stages.{s}.blocks.{b}"
        if stage.mixer == "conv":
            x = self.conv(vision_op(s, b, "mixer"), x, f"{prefix}.mixer", groups=stage.width)
        else:
            mixed = self.attention(x, s, b, stage, edge)
            x = self.graph.op("Add", vision_op(s, b, "attn_residual"), [x, mixed])
        y = self.conv(vision_op(s, b, "ffn_conv"), x, f"{prefix}.ffn.conv", groups=stage.width)
        y = self.gelu(self.conv(vision_op(s, b, "fc1"), y, f"{prefix}.ffn.fc1"))
        y = self.conv(vision_op(s, b, "fc2"), y, f"{prefix}.ffn.fc2")
        return self.graph.op("Add", vision_op(s, b, "residual"), [x, y])

    def attention(self, x: str, s: int, b: int, stage: StageConfig, edge: int) -> str:
        graph, prefix = self.graph, f"vision.stages.{s}.blocks.{b}"

        def op(part: str) -> str:
            return vision_op(s, b, part)

        tokens = self.to_tokens(op("tokens"), x, stage.width)
        scale = floats(graph, f"{op('norm')}_weight", [float_weight(self.weights, f"{prefix}.norm.weight")])
        shift = floats(graph, f"{op('norm')}_bias", [float_weight(self.weights, f"{prefix}.norm.bias")])
        normed = graph.op(
            "LayerNormalization", op("norm"), [tokens, scale, shift], axis=-1, epsilon=VISION_NORM_EPS
        )
        qkv = self.linear(op("qkv"), normed, f"{prefix}.attention.qkv")
        parts = [op(p) for p in "qkv"]
        graph.op("Split", f"{op('qkv')}_split", [qkv], outputs=parts, axis=-1, num_outputs=3)
        attended = graph.fused(
            "MultiHeadAttention", op("attn"), parts, num_heads=stage.num_heads, scale=VISION_HEAD_DIM**-0.5
        )
        mixed = self.linear(op("proj"), attended, f"{prefix}.attention.proj")
        mixed = graph.op("Transpose", f"{op('proj')}_nchw", [mixed], perm=[0, 2, 1])
        shape = graph.constant(f"s{s}_map_shape", np.array([0, stage.width, edge, edge], np.int64))
        return graph.op("Reshape", op("mixed"), [mixed, shape])

    def squeeze_excite(self, x: str) -> str:
        graph = self.graph
        pooled = graph.op("GlobalAveragePool", "se_pool", [x])
        gate = graph.op("Relu", "se_relu", [self.conv("se_reduce", pooled, "vision.final.se.reduce")])
        gate = graph.op("Sigmoid", "se_gate", [self.conv("se_expand", gate, "vision.final.se.expand")])
        return graph.op("Mul", "se_scaled", [x, gate])

    def to_tokens(self, name: str, x: str, width: int) -> str:
        """[B, C, H, W] -> [B, H * W, C]."""
        shape = self.graph.constant(f"flat_{width}_shape", np.array([0, width, -1], np.int64))
        flat = self.graph.op("Reshape", f"{name}_flat", [x, shape])
        return self.graph.op("Transpose", name, [flat], perm=[0, 2, 1])

    def conv(self, name: str, x: str, layer: str, stride: int = 1, groups: int = 1) -> str:
        kernel, bias = self.weights[f"{layer}.weight"], float_weight(self.weights, f"{layer}.bias")
        return conv(self.graph, name, x, (kernel, bias), stride, groups)

    def linear(self, name: str, x: str, layer: str) -> str:
        bias = f"{layer}.bias"
        biases = [float_weight(self.weights, bias)] if bias in self.weights else []
        return linear(self.graph, name, x, [self.weights[f"{layer}.weight"]], biases)

    def gelu(self, x: str) -> str:
        return gelu(self.graph, x)
