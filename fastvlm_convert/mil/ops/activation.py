"""Activations."""

import torch
from torch.nn import functional

from fastvlm_convert.mil.ops.table import Rounding, Tensor, axis_of, op


@op("relu")
def relu(x: Tensor) -> Tensor:
    """The larger of x and 0."""
    return torch.relu(x)


@op("relu6")
def relu6(x: Tensor) -> Tensor:
    """X kept between 0 and 6."""
    return torch.clamp(x, 0, 6)


@op("clamped_relu")
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    """At most beta: x where it is positive, else alpha * x."""
    return torch.clamp(functional.leaky_relu(x, alpha), max=beta)


@op("thresholded_relu")
def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    """X where it is at least alpha, else 0."""
    return torch.where(x >= alpha, x, 0)


@op("leaky_relu")
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    """X where it is positive, else alpha * x."""
    return functional.leaky_relu(x, alpha)


@op("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """X where it is positive, else alpha * x, with one alpha a channel (axis 1 of three or more)."""
    return functional.prelu(x, alpha)


@op("elu")
def elu(x: Tensor, alpha: float) -> Tensor:
    """X where it is positive, else alpha * (exp(x) - 1)."""
    return functional.elu(x, alpha)


@op("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """The Gaussian error linear unit: exact, or approximated by tanh or a sigmoid."""
    if mode == "EXACT":
        return functional.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return functional.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"unknown mode '{mode}'")


@op("sigmoid")
def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return torch.sigmoid(x)


@op("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Alpha * x + beta, kept between 0 and 1."""
    return torch.clamp(alpha * x + beta, 0, 1)


@op("silu")
def silu(x: Tensor) -> Tensor:
    """X * sigmoid(x)."""
    return functional.silu(x)


@op("softplus")
def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    return functional.softplus(x)


@op("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Alpha * log(1 + exp(beta * x)), with one alpha and beta a channel (axis 1)."""
    per_channel = (-1, *[1] * (x.ndim - 2))
    return alpha.view(per_channel) * functional.softplus(beta.view(per_channel) * x)


@op("softsign")
def softsign(x: Tensor) -> Tensor:
    """X / (1 + |x|)."""
    return functional.softsign(x)


@op("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Alpha * tanh(beta * x)."""
    return alpha * torch.tanh(beta * x)


@op("linear_activation")
def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Alpha * x + beta."""
    return alpha * x + beta


@op("softmax")
def softmax(x: Tensor, axis: int = -1, rounded: Rounding = None) -> Tensor:
    """exp(x) divided by its sum along an axis.

    In float16 the maximum is subtracted first, as every implementation does; without it any score above 11
    would overflow.
    """
    axis = axis_of(axis, x.ndim)
    if rounded is None:
        return torch.softmax(x, axis)
    powers = rounded(torch.exp(rounded(x - torch.amax(x, axis, keepdim=True))))
    return powers / rounded(powers.sum(axis, keepdim=True))
