"""Lower the image encoder and the projector: FastViTHD with BatchNorm and LayerScale folded."""

from collections.abc import Mapping, Sequence
from typing import Literal

import coremltools
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import Function, Var, types

from fastvlm_convert.exporters.coreml.functions import build_function
from fastvlm_convert.exporters.coreml.ops import Ops, mil_type, scalar
from fastvlm_convert.exporters.coreml.weights import Weights
from fastvlm_convert.io_names import (
    IMAGE,
    IMAGE_FEATURES,
    PIXEL_VALUES,
    VISION_HEAD_DIM,
    VISION_NORM_EPS,
    FloatName,
    vision_op,
)
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.recipe import FloatSettings
from fastvlm_convert.weights.model_config import ModelConfig, StageConfig

APPLE_INPUT = "images"  # what Apple's app calls the input of its vision package

_WITH_FUSED_ATTENTION = coremltools.target.iOS18


class VisionBuilder:
    """Builds the function of a vision package.

    Args:
        config: Dimensions; its image size is the program's.
        source: Canonical names, folded.
        precision: Storage and compute dtype.
        weights: The constants.
        target: Oldest system that can run it; attention is one operation from iOS 18 on.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: MixedSource,
        precision: FloatSettings,
        weights: Weights,
        target: coremltools.target,
    ) -> None:
        self.config = config
        self.source = source
        self.target = target
        self.ops = Ops(weights, precision)

    def function(self, input_kind: Literal["image", "tensor"], border: FloatName) -> Function:
        """Picture or pixel_values to projected image tokens, [1, tokens, hidden].

        Args:
            input_kind: `image` takes an RGB picture and scales it inside, `tensor` takes RGB in 0..1.
            border: Dtype of the output, and of a tensor input.
        """
        size = self.config.vision.image_size
        is_image = input_kind == "image"
        name = IMAGE if is_image else PIXEL_VALUES
        # Core ML hands pictures over as float32, 0..255.
        spec = mb.TensorSpec((1, 3, size, size), types.fp32 if is_image else mil_type(border))

        def body(inputs: Mapping[str, Var]) -> Sequence[Var]:
            self.ops.start_function()
            x = inputs[name]
            if is_image:
                x = mb.mul(x=x, y=scalar("float32", 1 / 255), name="pixels")
            projected = self._project(self._encode(x))
            if self.ops.dtype("projector_fc2") == border:
                return [mb.identity(x=projected, name=IMAGE_FEATURES)]
            return [
                mb.cast(x=projected, dtype="fp16" if border == "float16" else "fp32", name=IMAGE_FEATURES)
            ]

        function = build_function({name: spec}, body, self.target)
        if is_image:
            picture = coremltools.ImageType(
                IMAGE, (1, 3, size, size), color_layout=coremltools.colorlayout.RGB, channel_first=True
            )
            function.set_input_types((picture,))
        return function

    def apple_function(self) -> Function:
        """What Apple's app loads: `images` [1, 3, S, S] -> `image_features` [1, tokens, output_width]."""
        size = self.config.vision.image_size

        def body(inputs: Mapping[str, Var]) -> Sequence[Var]:
            self.ops.start_function()
            return [mb.identity(x=self._encode(inputs[APPLE_INPUT]), name=IMAGE_FEATURES)]

        spec = mb.TensorSpec((1, 3, size, size), types.fp32)
        return build_function({APPLE_INPUT: spec}, body, self.target)

    def _encode(self, x: Var) -> Var:
        """Pixels [1, 3, S, S] -> features [1, tokens, output_width]."""
        vision = self.config.vision
        for i, (stride, groups) in enumerate(((2, 1), (2, vision.stem_width), (1, 1))):
            x = self.ops.gelu(self._conv(f"stem_{i}", x, f"vision.stem.{i}", stride, groups))
        edge, width = vision.image_size // 4, vision.stem_width
        for s, stage in enumerate(vision.stages):
            if s:
                prefix = f"vision.stages.{s}.downsample"
                x = self.ops.gelu(self._conv(f"s{s}_down_0", x, f"{prefix}.0", 2, width))
                x = self.ops.gelu(self._conv(f"s{s}_down_1", x, f"{prefix}.1"))
                edge //= 2
            width = stage.width
            if stage.has_position:
                x = self._conv(f"s{s}_position", x, f"vision.stages.{s}.position", groups=width)
            for b in range(stage.depth):
                x = self._block(x, s, b, stage, edge)
        x = self._conv("final", x, "vision.final.conv", groups=width)
        x = self.ops.gelu(self._squeeze_excite(x))
        return self._to_tokens(x, "features", vision.output_width, edge)

    def _project(self, features: Var) -> Var:
        x = self.ops.gelu(self._linear("projector_fc1", features, "projector.fc1"))
        return self._linear("projector_fc2", x, "projector.fc2")

    def _block(self, x: Var, s: int, b: int, stage: StageConfig, edge: int) -> Var:
        ops, prefix = self.ops, f"vision.stages.{s}.blocks.{b}"
        if stage.mixer == "conv":
            x = self._conv(vision_op(s, b, "mixer"), x, f"{prefix}.mixer", groups=stage.width)
        else:
            x = ops.op("add", vision_op(s, b, "attn_residual"), x=x, y=self._attention(x, s, b, stage, edge))
        y = self._conv(vision_op(s, b, "ffn_conv"), x, f"{prefix}.ffn.conv", groups=stage.width)
        y = ops.gelu(self._conv(vision_op(s, b, "fc1"), y, f"{prefix}.ffn.fc1"))
        y = self._conv(vision_op(s, b, "fc2"), y, f"{prefix}.ffn.fc2")
        return ops.op("add", vision_op(s, b, "residual"), x=x, y=y)

    def _attention(self, x: Var, s: int, b: int, stage: StageConfig, edge: int) -> Var:
        ops, prefix, tokens = self.ops, f"vision.stages.{s}.blocks.{b}", edge * edge

        def op(part: str) -> str:
            return vision_op(s, b, part)

        normed = ops.op(
            "layer_norm",
            op("norm"),
            x=self._to_tokens(x, op("tokens"), stage.width, edge),
            axes=[-1],
            gamma=ops.weight(f"{op('norm')}_weight", op("norm"), self.source[f"{prefix}.norm.weight"]),
            beta=ops.weight(f"{op('norm')}_bias", op("norm"), self.source[f"{prefix}.norm.bias"]),
            epsilon=scalar(ops.dtype(op("norm")), VISION_NORM_EPS),
        )
        packed = self._linear(op("qkv"), normed, f"{prefix}.attention.qkv")
        parts = mb.split(x=packed, num_splits=3, axis=-1, name=op("qkv_split"))
        heads = [
            mb.transpose(
                x=mb.reshape(
                    x=part, shape=[1, tokens, stage.num_heads, VISION_HEAD_DIM], name=op(f"{p}_heads")
                ),
                perm=[0, 2, 1, 3],
                name=op(f"{p}_transposed"),
            )
            for p, part in zip("qkv", parts, strict=True)
        ]
        mixed = self._attend(op("attn"), *heads)
        mixed = mb.transpose(x=mixed, perm=[0, 2, 1, 3], name=op("attn_transposed"))
        mixed = mb.reshape(x=mixed, shape=[1, tokens, stage.width], name=op("attn_flat"))
        mixed = self._linear(op("proj"), mixed, f"{prefix}.attention.proj")
        mixed = mb.transpose(x=mixed, perm=[0, 2, 1], name=op("proj_nchw"))
        return mb.reshape(x=mixed, shape=[1, stage.width, edge, edge], name=op("mixed"))

    def _attend(self, name: str, query: Var, key: Var, value: Var) -> Var:
        ops = self.ops
        if self.target >= _WITH_FUSED_ATTENTION:
            return ops.op("scaled_dot_product_attention", name, query=query, key=key, value=value)
        dtype = ops.dtype(name)
        scaled = ops.op("mul", f"{name}_scaled", dtype, x=query, y=scalar(dtype, VISION_HEAD_DIM**-0.5))
        scores = ops.op("matmul", f"{name}_scores", dtype, x=scaled, y=key, transpose_y=True)
        shares = ops.op("softmax", f"{name}_softmax", dtype, x=scores, axis=-1)
        return ops.op("matmul", name, dtype, x=shares, y=value)

    def _squeeze_excite(self, x: Var) -> Var:
        ops = self.ops
        pooled = ops.op("reduce_mean", "se_pool", x=x, axes=[2, 3], keep_dims=True)
        gate = ops.op("relu", "se_relu", x=self._conv("se_reduce", pooled, "vision.final.se.reduce"))
        gate = ops.op("sigmoid", "se_gate", x=self._conv("se_expand", gate, "vision.final.se.expand"))
        return ops.op("mul", "se_scaled", x=x, y=gate)

    def _to_tokens(self, x: Var, name: str, width: int, edge: int) -> Var:
        """[1, C, H, W] -> [1, H * W, C]."""
        flat = mb.reshape(x=x, shape=[1, width, edge * edge], name=f"{name}_flat")
        return mb.transpose(x=flat, perm=[0, 2, 1], name=name)

    def _conv(self, name: str, x: Var, weight: str, stride: int = 1, groups: int = 1) -> Var:
        source = self.source
        return self.ops.conv(name, x, source[f"{weight}.weight"], source[f"{weight}.bias"], stride, groups)

    def _linear(self, name: str, x: Var, weight: str) -> Var:
        bias = self.source.get(f"{weight}.bias")
        return self.ops.linear(name, x, [self.source[f"{weight}.weight"]], None if bias is None else [bias])
