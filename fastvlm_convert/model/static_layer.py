"""Layers that multiply integers, as runtimes compute them: the reference for what activations lose.

The products are integers that float32 holds exactly as long as their sums stay below 2^24, which those of 8
bits do in practice; so the only differences to a runtime are those of the floats between such layers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastvlm_convert.quantized.activations import FLOAT32_TIE, TensorScale
from fastvlm_convert.quantized.weight import MixedSource, QuantizedWeight, is_static

Follow = Callable[[str], Tensor | None]
"""What a runtime rounded the `input` or `output` of a layer to, float32 of its shape; None if it did not."""


class StaticLayer(nn.Module):
    """A convolution or a linear layer with static quantization of what it reads and gives.

    Args:
        layer: The float layer, whose bias is taken.
        weight: Its integers, and how activations are rounded.

    Attributes:
        is_static: Off, activations are floats; the weights stay integers.
        follow: A runtime's own integers, taken wherever they are as good a rounding; None rounds alone.
        tie: By how much of a step a rounding may be the worse one, and count as as good.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, weight: QuantizedWeight) -> None:
        super().__init__()
        assert weight.activations is not None
        matrix = weight.read(0, weight.rows)
        shape = (-1, *[1] * (len(weight.shape) - 2))  # over what a channel has beside its number
        integers = matrix.q.astype("float32") - matrix.scheme.middle
        products = torch.from_numpy(weight.activations.bias_scale(matrix.scale)).view(shape)
        self.scales = weight.activations
        self.layer = layer
        self.integers = torch.from_numpy(integers.reshape(weight.shape))
        self.product_scale = products
        self.is_static = True
        self.follow: Follow | None = None
        self.tie = FLOAT32_TIE

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] or [B, N, C], floats in and out."""
        if not self.is_static:
            y: Tensor = self.layer(x)
            return y
        read, given = self.scales.input, self.scales.output
        q = self._rounded("input", x / read.scale, read) - read.zero_point
        bias = self.layer.bias
        if given is None:
            linear = functional.linear(q, self.integers) * self.product_scale.view(-1)
            return linear if bias is None else linear + bias
        assert isinstance(self.layer, nn.Conv2d)
        assert isinstance(self.layer.padding, tuple)
        assert bias is not None
        layer = self.layer
        sums = functional.conv2d(q, self.integers, None, layer.stride, layer.padding, groups=layer.groups)
        sums += torch.round(bias.view(self.product_scale.shape) / self.product_scale)
        sums *= self.product_scale / given.scale
        return self._rounded("output", sums, given).sub_(given.zero_point).mul_(given.scale)

    def keep_bias_in_float16(self) -> None:
        """Take the bias that a float16 program holds: its whole steps, as far as that dtype has them."""
        bias = self.layer.bias
        if self.scales.output is not None and bias is not None:
            step = self.product_scale.view(-1)
            bias.data = (torch.round(bias / step) * step).half().float()

    def _rounded(self, what: str, steps: Tensor, scale: TensorScale) -> Tensor:
        """Unsigned integers of activations in steps of their scale, as floats."""
        alone = torch.round(steps).add_(scale.zero_point).clamp_(0, scale.levels - 1)
        theirs = None if self.follow is None else self.follow(what)
        if theirs is None:
            return alone
        exact = steps.add(scale.zero_point).clamp_(0, scale.levels - 1)
        return torch.where((theirs - exact).abs() <= 0.5 + self.tie, theirs, alone)


def make_static(
    model: nn.Module, weights: MixedSource, block: str = "", path: str = ""
) -> dict[str, StaticLayer]:
    """Replace the layers of a model whose weights say how activations are rounded.

    Args:
        model: The model, holding these weights as floats.
        weights: Canonical names.
        block: The part of the whole model that it holds; the names of its weights begin with that.
        path: Where it holds that part.

    Returns:
        The layers, by name.
    """
    made = {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if not is_static(weight):
            continue
        if not f"{layer}.".startswith(f"{block}." if block else ""):
            continue
        own = path + layer.removeprefix(block)
        module = model.get_submodule(own)
        assert isinstance(module, nn.Conv2d | nn.Linear)
        made[layer] = static = StaticLayer(module, weight)
        model.set_submodule(own, static)
    return made
