"""FastViTHD, the image encoder (FastVLM, arXiv:2412.13303, section 3; blocks from FastViT, arXiv:2303.14189).

A convolutional stem (stride 4), three stages of RepMixer blocks and two of self-attention, each stage
after the first at half the resolution of the one before: an image becomes (S / 64)^2 tokens.

Shapes: B batch, C channels, H and W the stage's resolution.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastvlm_convert.io_names import VISION_HEAD_DIM, VISION_NORM_EPS
from fastvlm_convert.weights.model_config import StageConfig, VisionConfig


def depthwise(width_in: int, width_out: int, kernel: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution in which every input channel is a group of its own."""
    return nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, groups=width_in, bias=bias)


class GeluConvs(nn.ModuleList):
    """Convolutions with a GELU after each; [B, C, H, W] -> [B, C', H', W']."""

    def forward(self, x: Tensor) -> Tensor:
        for conv in self:
            x = functional.gelu(conv(x))
        return x


class ConvFFN(nn.Module):
    """Feed-forward network that looks at a 7 x 7 neighborhood first; [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, width: int, hidden: int, folded: bool) -> None:
        super().__init__()
        self.conv = depthwise(width, width, 7, bias=folded)
        self.bn = nn.Identity() if folded else nn.BatchNorm2d(width, VISION_NORM_EPS)
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(self.bn(self.conv(x)))))


class Attention(nn.Module):
    """Multi-head self-attention over all positions; [B, N, C] -> [B, N, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = width // VISION_HEAD_DIM
        q, k, v = self.qkv(x).view(batch, tokens, 3, heads, VISION_HEAD_DIM).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class RepMixerBlock(nn.Module):
    """Token mixing by one (reparameterized) depthwise convolution, then the feed-forward network."""

    def __init__(self, stage: StageConfig, folded: bool) -> None:
        super().__init__()
        self.mixer = depthwise(stage.width, stage.width, 3)
        self.ffn = ConvFFN(stage.width, stage.ffn_width, folded)
        self.ffn_scale = None if folded else nn.Parameter(torch.ones(stage.width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)  # its kernel holds the residual connection
        return x + _scaled(self.ffn(x), self.ffn_scale)


class AttentionBlock(nn.Module):
    """Token mixing by self-attention, then the feed-forward network."""

    def __init__(self, stage: StageConfig, folded: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(stage.width, VISION_NORM_EPS)
        self.attention = Attention(stage.width)
        self.ffn = ConvFFN(stage.width, stage.ffn_width, folded)
        self.attention_scale = None if folded else nn.Parameter(torch.ones(stage.width))
        self.ffn_scale = None if folded else nn.Parameter(torch.ones(stage.width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed = self.attention(self.norm(tokens)).transpose(1, 2).view_as(x)
        x = x + _scaled(mixed, self.attention_scale)
        return x + _scaled(self.ffn(x), self.ffn_scale)


class Stage(nn.Module):
    """Halve the resolution (all but the first stage), add positions (attention stages), run the blocks."""

    def __init__(self, stage: StageConfig, width_in: int | None, folded: bool) -> None:
        super().__init__()
        self.downsample = None
        if width_in is not None:
            self.downsample = GeluConvs(
                [depthwise(width_in, stage.width, 7, stride=2), nn.Conv2d(stage.width, stage.width, 1)]
            )
        self.position = depthwise(stage.width, stage.width, 7) if stage.has_position else None
        block = RepMixerBlock if stage.mixer == "conv" else AttentionBlock
        self.blocks = nn.ModuleList([block(stage, folded) for _ in range(stage.depth)])

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        if self.position is not None:
            x = self.position(x)
        for block in self.blocks:
            x = block(x)
        return x


class SqueezeExcite(nn.Module):
    """Weigh channels by what the whole image holds; [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, hidden, 1)
        self.expand = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = functional.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(gate))


class FinalConv(nn.Module):
    """Widen the last stage to the features' width; [B, C, H, W] -> [B, output_width, H, W]."""

    def __init__(self, width: int, vision: VisionConfig) -> None:
        super().__init__()
        self.conv = depthwise(width, vision.output_width, 3)
        self.se = SqueezeExcite(vision.output_width, vision.squeeze_width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.se(self.conv(x)))


class FastViTHD(nn.Module):
    """The encoder; pixels float32 [B, 3, S, S] in 0..1 -> features [B, (S / 64)^2, output_width]."""

    def __init__(self, vision: VisionConfig, folded: bool = False) -> None:
        super().__init__()
        width = vision.stem_width
        self.stem = GeluConvs(
            [
                nn.Conv2d(3, width, 3, stride=2, padding=1),
                depthwise(width, width, 3, stride=2),
                nn.Conv2d(width, width, 1),
            ]
        )
        widths = [None, *(stage.width for stage in vision.stages)]
        self.stages = nn.ModuleList(
            [Stage(stage, width_in, folded) for stage, width_in in zip(vision.stages, widths, strict=False)]
        )
        self.final = FinalConv(vision.stages[-1].width, vision)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        for stage in self.stages:
            x = stage(x)
        return self.final(x).flatten(2).transpose(1, 2)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.view(-1, 1, 1)
