"""The network in its training form: FastViTHD, projector and Qwen2 decoder, with Apple's names.

Convolutions train with BatchNorm and identity branches; `fold` merges those into plain
convolutions, after which `state_dict()` has the names of Apple's inference checkpoints.

Shapes: B pictures, C channels, H x W pixels, N image tokens, S sequence, D decoder width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the demo network."""

    image_size: int = 256
    widths: tuple[int, ...] = (32, 64, 128, 256, 256)
    depths: tuple[int, ...] = (1, 1, 2, 1, 1)
    vocab_size: int = 320
    hidden: int = 256
    intermediate: int = 512
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    rope_theta: float = 1e6
    rms_eps: float = 1e-6

    @property
    def feature_size(self) -> int:
        """Channels of an image token before the projector."""
        return 2 * self.widths[-1]

    @property
    def num_image_tokens(self) -> int:
        """Image tokens per picture."""
        return (self.image_size // 64) ** 2


class ConvNorm(nn.Module):
    """A convolution with BatchNorm and, where shapes allow it, an identity branch."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        skip: bool = False,
        gamma: float = 1.0,
    ) -> None:
        """Build the branch; `gamma` is the first BatchNorm scale."""
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.skip = skip
        nn.init.constant_(self.bn.weight, gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        y = self.bn(self.conv(x))
        return x + y if self.skip else y

    @torch.no_grad()
    def folded(self) -> nn.Conv2d:
        """The equivalent convolution with bias, computed in float64."""
        conv, bn = self.conv, self.bn
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        weight = conv.weight.double() * scale[:, None, None, None]
        if self.skip:
            center = conv.kernel_size[0] // 2
            weight[:, 0, center, center] += 1.0
        merged = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            groups=conv.groups,
        )
        merged.weight.copy_(weight)
        merged.bias.copy_(bn.bias.double() - bn.running_mean.double() * scale)
        return merged


def fold(module: nn.Module) -> nn.Module:
    """Replace every `ConvNorm` below a module by its plain convolution, in place."""
    for name, child in module.named_children():
        if isinstance(child, ConvNorm):
            setattr(module, name, child.folded())
        else:
            fold(child)
    return module


class Reparam(nn.Module):
    """A holder that gives a convolution Apple's name `reparam_conv`."""

    def __init__(self, *sizes: int, **options: int | bool | float) -> None:
        """Take the arguments of `ConvNorm`."""
        super().__init__()
        self.reparam_conv = ConvNorm(*sizes, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the convolution."""
        return self.reparam_conv(x)


class ReparamGelu(Reparam):
    """`Reparam` followed by GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the convolution and GELU."""
        return F.gelu(self.reparam_conv(x))


class LargeKernel(nn.Module):
    """The strided 7x7 convolution of a downsampling step, with GELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Map `inputs` to `outputs` channels at half the resolution."""
        super().__init__()
        self.lkb_reparam = ConvNorm(inputs, outputs, 7, stride=2, groups=inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H/2, W/2)."""
        return F.gelu(self.lkb_reparam(x))


class Downsample(nn.Module):
    """Halve the resolution, widen the channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Map `inputs` to `outputs` channels."""
        super().__init__()
        self.proj = nn.Sequential(LargeKernel(inputs, outputs), ReparamGelu(outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H/2, W/2)."""
        return self.proj(x)


class ConvFFN(nn.Module):
    """Depthwise 7x7 convolution, then a two-layer perceptron per pixel."""

    def __init__(self, width: int) -> None:
        """Keep `width` channels, four times as many inside."""
        super().__init__()
        self.conv = nn.Sequential()
        conv = nn.Conv2d(width, width, 7, padding=3, groups=width, bias=False)
        self.conv.add_module("conv", conv)
        self.conv.add_module("bn", nn.BatchNorm2d(width))
        self.fc1 = nn.Conv2d(width, 4 * width, 1)
        self.fc2 = nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, C, H, W)."""
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class RepMixerBlock(nn.Module):
    """Token mixing by convolution, then `ConvFFN`."""

    def __init__(self, width: int) -> None:
        """Keep `width` channels."""
        super().__init__()
        self.token_mixer = Reparam(width, width, 3, groups=width, skip=True, gamma=0.3)
        self.convffn = ConvFFN(width)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, C, H, W)."""
        x = self.token_mixer(x)
        return x + self.layer_scale * self.convffn(x)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class VisionAttention(nn.Module):
    """Full self-attention over pixels, heads of 32."""

    def __init__(self, width: int) -> None:
        """Keep `width` channels."""
        super().__init__()
        self.heads = width // 32
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, C, H, W)."""
        batch, width, height, columns = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).view(batch, -1, 3, self.heads, 32).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        tokens = self.proj(mixed.transpose(1, 2).reshape(batch, -1, width))
        return tokens.transpose(1, 2).view(batch, width, height, columns)


class AttentionBlock(nn.Module):
    """Attention and `ConvFFN`, each with a residual."""

    def __init__(self, width: int) -> None:
        """Keep `width` channels."""
        super().__init__()
        self.norm = ChannelNorm(width)
        self.token_mixer = VisionAttention(width)
        self.convffn = ConvFFN(width)
        self.layer_scale_1 = nn.Parameter(torch.full((width, 1, 1), 0.3))
        self.layer_scale_2 = nn.Parameter(torch.full((width, 1, 1), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, C, H, W)."""
        x = x + self.layer_scale_1 * self.token_mixer(self.norm(x))
        return x + self.layer_scale_2 * self.convffn(x)


class SqueezeExcite(nn.Module):
    """Scale channels by a gate computed from their means."""

    def __init__(self, width: int) -> None:
        """Keep `width` channels, a sixteenth of them inside."""
        super().__init__()
        self.reduce = nn.Conv2d(width, width // 16, 1)
        self.expand = nn.Conv2d(width // 16, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, C, H, W)."""
        gate = F.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(gate))


class Expansion(nn.Module):
    """The last convolution: twice the channels, squeeze-and-excite, GELU."""

    def __init__(self, width: int) -> None:
        """Map `width` to twice as many channels."""
        super().__init__()
        self.reparam_conv = ConvNorm(width, 2 * width, 3, groups=width)
        self.se = SqueezeExcite(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 2C, H, W)."""
        return F.gelu(self.se(self.reparam_conv(x)))


class Head(nn.Module):
    """MobileCLIP's classifier head, which checkpoints store and nothing uses."""

    def __init__(self, width: int, classes: int = 64) -> None:
        """Hold a matrix (width, classes)."""
        super().__init__()
        self.proj = nn.Parameter(torch.randn(width, classes) * width**-0.5)


class Vision(nn.Module):
    """FastViTHD: pictures (B, 3, H, W) in [0, 1] to features (B, N, 2C)."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build the five stages."""
        super().__init__()
        first = config.widths[0]
        self.patch_embed = nn.Sequential(
            ReparamGelu(3, first, 3, stride=2),
            ReparamGelu(first, first, 3, stride=2, groups=first),
            ReparamGelu(first, first, 1),
        )
        layers: list[nn.Module] = []
        for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            if stage > 0:
                layers.append(Downsample(config.widths[stage - 1], width))
            block = AttentionBlock if stage >= 3 else RepMixerBlock
            if stage >= 3:
                layers.append(Reparam(width, width, 7, groups=width, skip=True, gamma=0.3))
            layers.append(nn.Sequential(*(block(width) for _ in range(depth))))
        self.network = nn.ModuleList(layers)
        self.conv_exp = Expansion(config.widths[-1])
        self.head = Head(config.feature_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pictures to one feature row per image token."""
        x = self.patch_embed(pixels)
        for layer in self.network:
            x = layer(x)
        return self.conv_exp(x).flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions and biases on q, k and v."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build the four projections."""
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, queries)
        self.k_proj = nn.Linear(config.hidden, keys)
        self.v_proj = nn.Linear(config.hidden, keys)
        self.o_proj = nn.Linear(queries, config.hidden, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Attend within (B, S, D) where mask (B, 1, S, S) is true."""
        batch, length, _ = x.shape
        q, k, v = (
            proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, *rope), _rotate(k, *rope)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class MLP(nn.Module):
    """The gated perceptron of Qwen2."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build the three projections."""
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, S, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and perceptron, each after an RMSNorm and with a residual."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build one layer."""
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden, config.rms_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, config.rms_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Keep the shape (B, S, D)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Qwen2 with tied embeddings."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build and initialize all layers."""
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, config.rms_eps)
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden**-0.5)
        for layer in self.layers:
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                last.weight.data.mul_((2 * config.layers) ** -0.5)

    def forward(self, embeds: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Map embeddings (B, S, D) to normalized hidden states (B, S, D)."""
        return self.norm(self.residuals(embeds, positions, mask)[-1])

    def residuals(self, embeds: Tensor, positions: Tensor, mask: Tensor) -> list[Tensor]:
        """The residual stream (B, S, D) after every layer."""
        steps = torch.arange(0, self.head_dim, 2, device=embeds.device) / self.head_dim
        angles = positions[:, None, :, None] * self.rope_theta**-steps
        rope = angles.cos().to(embeds.dtype), angles.sin().to(embeds.dtype)
        streams = []
        for layer in self.layers:
            embeds = layer(embeds, rope, mask)
            streams.append(embeds)
        return streams

    def logits(self, hidden: Tensor) -> Tensor:
        """Score the vocabulary for hidden states (..., D)."""
        return F.linear(hidden, self.embed_tokens.weight)


class Projector(nn.Sequential):
    """Features to decoder embeddings: Linear, GELU, Linear."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build both layers."""
        first = nn.Linear(config.feature_size, config.hidden)
        super().__init__(first, nn.GELU(), nn.Linear(config.hidden, config.hidden))
