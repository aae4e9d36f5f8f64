"""Lower the image encoder and the projector: FastViTHD with BatchNorm and LayerScale folded."""

import numpy as np

from fastvlm_convert.exporters.onnx.affine import dequantized
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.io_names import (
    BATCH,
    IMAGE_FEATURES,
    NUM_IMAGE_TOKENS,
    PIXEL_VALUES,
    VISION_HEAD_DIM,
    VISION_NORM_EPS,
    vision_op,
)
from fastvlm_convert.quantized.weight import AffineSource, QuantizedWeight, float_weight
from fastvlm_convert.weights.model_config import ModelConfig, StageConfig


def build_vision(graph: Graph, config: ModelConfig, weights: AffineSource) -> None:
    """Add encoder and projector to a graph.

    Args:
        graph: An empty graph.
        config: Dimensions; its image size is the graph's.
        weights: Canonical names, folded.
    """
    size, hidden = config.vision.image_size, config.decoder.hidden_size
    x = graph.input(PIXEL_VALUES, "float32", [BATCH, 3, size, size])
    if graph.compute != "float32":
        x = graph.cast(x, graph.compute, "pixels_cast")
    builder = _Builder(graph, weights)
    features = builder.encode(x, config)
    projected = builder.project(features)
    flat = graph.constant("flat_shape", np.array([-1, hidden], np.int64))
    # Rank 2: onnxruntime-genai passes [0, hidden] when a prompt has no image.
    if graph.compute == "float32":
        graph.op("Reshape", [projected, flat], IMAGE_FEATURES)
    else:
        graph.cast(graph.op("Reshape", [projected, flat], "flat_features"), "float32", IMAGE_FEATURES)
    graph.output(IMAGE_FEATURES, "float32", [NUM_IMAGE_TOKENS, hidden])


class _Builder:
    """Adds the blocks of the encoder; every method takes and returns the name of a value."""

    def __init__(self, graph: Graph, weights: AffineSource) -> None:
        self.graph = graph
        self.weights = weights

    def encode(self, x: str, config: ModelConfig) -> str:
        """Pixels [B, 3, S, S] -> features [B, tokens, output_width]."""
        vision = config.vision
        for i, (stride, groups) in enumerate(((2, 1), (2, vision.stem_width), (1, 1))):
            x = self.gelu(self.conv(x, f"vision.stem.{i}", f"stem_{i}", stride, groups))
        edge, width = vision.image_size // 4, vision.stem_width
        for s, stage in enumerate(vision.stages):
            if s:
                x, edge = self.downsample(x, s, width), edge // 2
            width = stage.width
            if stage.has_position:
                x = self.conv(x, f"vision.stages.{s}.position", f"s{s}_position", groups=width)
            for b in range(stage.depth):
                x = self.block(x, s, b, stage, edge)
        x = self.conv(x, "vision.final.conv", "final", groups=width)
        x = self.gelu(self.squeeze_excite(x))
        return self.to_tokens(x, "features", vision.output_width)

    def project(self, features: str) -> str:
        """Features -> projected image tokens [B, tokens, hidden]."""
        x = self.gelu(self.linear(features, "projector.fc1", "projector_fc1"))
        return self.linear(x, "projector.fc2", "projector_fc2")

    def downsample(self, x: str, s: int, width: int) -> str:
        prefix = f"vision.stages.{s}.downsample"
        x = self.gelu(self.conv(x, f"{prefix}.0", f"s{s}_down_0", 2, width))
        return self.gelu(self.conv(x, f"{prefix}.1", f"s{s}_down_1"))

    def block(self, x: str, s: int, b: int, stage: StageConfig, edge: int) -> str:
        prefix = f"vision.stages.{s}.blocks.{b}"
        if stage.mixer == "conv":
            x = self.conv(x, f"{prefix}.mixer", vision_op(s, b, "mixer"), groups=stage.width)
        else:
            mixed = self.attention(x, s, b, stage, edge)
            x = self.graph.op("Add", [x, mixed], vision_op(s, b, "attn_residual"))
        y = self.conv(x, f"{prefix}.ffn.conv", vision_op(s, b, "ffn_conv"), groups=stage.width)
        y = self.gelu(self.conv(y, f"{prefix}.ffn.fc1", vision_op(s, b, "fc1")))
        y = self.conv(y, f"{prefix}.ffn.fc2", vision_op(s, b, "fc2"))
        return self.graph.op("Add", [x, y], vision_op(s, b, "residual"))

    def attention(self, x: str, s: int, b: int, stage: StageConfig, edge: int) -> str:
        prefix = f"vision.stages.{s}.blocks.{b}"
        graph, weights = self.graph, self.weights

        def op(part: str) -> str:
            return vision_op(s, b, part)

        tokens = self.to_tokens(x, op("tokens"), stage.width)
        scale = graph.weight(f"{op('norm')}_weight", float_weight(weights, f"{prefix}.norm.weight"))
        shift = graph.weight(f"{op('norm')}_bias", float_weight(weights, f"{prefix}.norm.bias"))
        normed = graph.op(
            "LayerNormalization", [tokens, scale, shift], op("norm"), axis=-1, epsilon=VISION_NORM_EPS
        )
        qkv = self.linear(normed, f"{prefix}.attention.qkv", op("qkv"))
        parts = [op(p) for p in "qkv"]
        graph.op("Split", [qkv], f"{op('qkv')}_split", outputs=parts, axis=-1, num_outputs=3)
        attended = graph.fused(
            "MultiHeadAttention", parts, op("attn"), num_heads=stage.num_heads, scale=VISION_HEAD_DIM**-0.5
        )
        mixed = self.linear(attended, f"{prefix}.attention.proj", op("proj"))
        mixed = graph.op("Transpose", [mixed], f"{op('proj')}_nchw", perm=[0, 2, 1])
        shape = graph.constant(f"s{s}_map_shape", np.array([0, stage.width, edge, edge], np.int64))
        return graph.op("Reshape", [mixed, shape], op("mixed"))

    def squeeze_excite(self, x: str) -> str:
        graph = self.graph
        pooled = graph.op("GlobalAveragePool", [x], "se_pool")
        gate = graph.op("Relu", [self.conv(pooled, "vision.final.se.reduce", "se_reduce")], "se_relu")
        gate = graph.op("Sigmoid", [self.conv(gate, "vision.final.se.expand", "se_expand")], "se_gate")
        return graph.op("Mul", [x, gate], "se_scaled")

    def to_tokens(self, x: str, name: str, width: int) -> str:
        """[B, C, H, W] -> [B, H * W, C]."""
        shape = self.graph.constant(f"flat_{width}_shape", np.array([0, width, -1], np.int64))
        flat = self.graph.op("Reshape", [x, shape], f"{name}_flat")
        return self.graph.op("Transpose", [flat], name, perm=[0, 2, 1])

    def conv(self, x: str, weight: str, name: str, stride: int = 1, groups: int = 1) -> str:
        kernel = self.weights[f"{weight}.weight"].shape[2]
        inputs = [
            x,
            self.matrix(f"{name}_weight", f"{weight}.weight"),
            self.graph.weight(f"{name}_bias", float_weight(self.weights, f"{weight}.bias")),
        ]
        return self.graph.op(
            "Conv",
            inputs,
            name,
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[kernel // 2] * 4,
            group=groups,
        )

    def linear(self, x: str, weight: str, name: str) -> str:
        matrix = self.matrix(f"{name}_weight", f"{weight}.weight")
        if f"{weight}.bias" not in self.weights:
            return self.graph.fused("FusedMatMul", [x, matrix], name, transB=1)
        product = self.graph.fused("FusedMatMul", [x, matrix], f"{name}_product", transB=1)
        bias = self.graph.weight(f"{name}_bias", float_weight(self.weights, f"{weight}.bias"))
        return self.graph.op("Add", [product, bias], name)

    def matrix(self, name: str, weight: str) -> str:
        """A weight in floats, whatever it is stored as."""
        found = self.weights[weight]
        if isinstance(found, QuantizedWeight):
            return dequantized(self.graph, name, found)
        return self.graph.weight(name, float_weight(self.weights, weight))

    def gelu(self, x: str) -> str:
        return self.graph.op("Gelu", [x], f"{x}_gelu")
