"""FastViT's train-time blocks in torch, written from the papers, and their names in Apple's and timm's code.

MobileOne (arXiv:2206.04040): a convolution, a pointwise one and the input itself, each normalised, summed.
FastViT (arXiv:2303.14189): RepMixer, the large-kernel downsampling, the convolutional position encoding.
"""

import torch
from torch import Tensor, nn

# Module names here -> in the two code bases, as their checkpoints have them.
APPLE = {"branches": "rbr_conv", "pointwise": "rbr_scale", "identity": "rbr_skip", "large": "lkb_origin"}
APPLE |= {"small": "small_conv", "position": "pe", "layer_scale": "layer_scale"}
TIMM = {"branches": "conv_kxk", "pointwise": "conv_scale", "identity": "identity", "large": "large_conv"}
TIMM |= {"small": "small_conv", "position": "pos_enc", "layer_scale": "layer_scale.gamma"}


class ConvNorm(nn.Module):
    """A convolution like `conv`, of another kernel size perhaps, and BatchNorm."""

    def __init__(self, conv: nn.Conv2d, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            kernel,
            conv.stride,
            kernel // 2,
            groups=conv.groups,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class MobileOne(nn.Module):
    """Sum of `num_branches` k x k convolutions, a pointwise one and the input, each normalised."""

    def __init__(self, conv: nn.Conv2d, num_branches: int, pointwise: bool = True) -> None:
        super().__init__()
        kernel = conv.kernel_size[0]
        self.branches = nn.ModuleList([ConvNorm(conv, kernel) for _ in range(num_branches)])
        self.pointwise = ConvNorm(conv, 1) if pointwise and kernel > 1 else None
        same = conv.in_channels == conv.out_channels and conv.stride == (1, 1)
        self.identity = nn.BatchNorm2d(conv.in_channels) if same else None

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        parts += [part(x) for part in (self.pointwise, self.identity) if part is not None]
        return sum(parts)


class RepMixer(nn.Module):
    """x + layer_scale * (mixer(x) - norm(x))."""

    def __init__(self, conv: nn.Conv2d, scaled: bool = True) -> None:
        super().__init__()
        self.norm = MobileOne(conv, 0, pointwise=False)
        self.mixer = MobileOne(conv, 1)
        self.layer_scale = nn.Parameter(torch.ones(conv.out_channels, 1, 1)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(x) - self.norm(x)
        return x + (mixed if self.layer_scale is None else self.layer_scale * mixed)


class LargeKernel(nn.Module):
    """A large convolution and a small one, each normalised, summed."""

    def __init__(self, conv: nn.Conv2d, small: int | None = 3) -> None:
        super().__init__()
        self.large = ConvNorm(conv, conv.kernel_size[0])
        self.small = None if small is None else ConvNorm(conv, small)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) if self.small is None else self.large(x) + self.small(x)


class Position(nn.Module):
    """x + conv(x)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.position = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, groups=conv.groups
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.position(x)


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Give a module weights and statistics as after training, and put it into evaluation mode."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=rng) * (high - low) + low)

    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                uniform(part.weight, 0.5, 1.5)
                uniform(part.bias, -0.2, 0.2)
                uniform(part.running_mean, -0.2, 0.2)
                uniform(part.running_var, 0.3, 2.0)
            elif isinstance(part, nn.Conv2d):
                bound = part.weight[0].numel() ** -0.5
                uniform(part.weight, -bound, bound)
                if part.bias is not None:
                    uniform(part.bias, -0.2, 0.2)
            elif getattr(part, "layer_scale", None) is not None:
                uniform(part.layer_scale, 0.2, 0.8)
    return module.eval()


def stored_names(module: nn.Module, prefix: str, names: dict[str, str]) -> dict[str, Tensor]:
    """The state of a module under the names that a checkpoint has for it."""
    return {
        ".".join([prefix, *(names.get(part, part) for part in key.split("."))]): value
        for key, value in module.state_dict().items()
    }
