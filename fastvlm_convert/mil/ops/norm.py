"""Normalizations. In float16 every intermediate result is rounded, squares and their sums above all."""

import torch
from torch.nn import functional

from fastvlm_convert.mil.ops.reduction import mean_of, sum_of
from fastvlm_convert.mil.ops.table import Ints, Rounding, Tensor, axes_of, in_half, op


@op("layer_norm")
def layer_norm(
    x: Tensor,
    axes: Ints | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
    rounded: Rounding = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) over `axes`, then * gamma + beta of the shape of these axes."""
    normed = axes_of(axes, x.ndim)
    shape = [x.shape[a] for a in normed]
    last = normed == tuple(range(x.ndim - len(normed), x.ndim))
    if rounded is None and last and normed:
        return functional.layer_norm(x, shape, gamma, beta, epsilon)
    broadcast = [n if a in normed else 1 for a, n in enumerate(x.shape)]
    scale = None if gamma is None else gamma.reshape(broadcast)
    shift = None if beta is None else beta.reshape(broadcast)
    return _normalized(x, normed, scale, shift, epsilon, rounded)


@op("instance_norm")
def instance_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
    rounded: Rounding = None,
) -> Tensor:
    """Like layer_norm over all axes after the channels (axis 1), with one gamma and beta a channel."""
    return _normalized(
        x,
        tuple(range(2, x.ndim)),
        _per_channel(gamma, x.ndim),
        _per_channel(beta, x.ndim),
        epsilon,
        rounded,
    )


@op("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
    rounded: Rounding = None,
) -> Tensor:
    """Gamma * (x - mean) / sqrt(variance + epsilon) + beta, with one of each a channel (axis 1)."""
    if rounded is None:
        return functional.batch_norm(x, mean, variance, gamma, beta, training=False, eps=epsilon)
    # A compiler folds all of it into one multiplication and addition.
    factor = torch.rsqrt(variance + epsilon) * (1 if gamma is None else gamma)
    shift = (0 if beta is None else beta) - mean * factor
    factors, shifts = _per_channel(rounded(factor), x.ndim), _per_channel(rounded(shift), x.ndim)
    assert factors is not None
    assert shifts is not None
    return rounded(x * factors) + shifts


@op("l2_norm")
def l2_norm(x: Tensor, epsilon: float = 1e-6, rounded: Rounding = None) -> Tensor:
    """X / sqrt(sum of squares over the last three axes + epsilon)."""
    squares = in_half(rounded, torch.square(x))
    total = sum_of(squares, tuple(range(max(x.ndim - 3, 0), x.ndim)), True, rounded)
    return x / in_half(rounded, torch.sqrt(total + epsilon))


@op("local_response_norm")
def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, rounded: Rounding = None
) -> Tensor:
    """X / (k + alpha / size * sum of the squares of `size` neighboring channels) ** beta."""
    if size < 1:
        raise ValueError(f"size is {size}")
    if rounded is None:
        return functional.local_response_norm(x, size, alpha, beta, k)
    # The sum of neighbors is a window over the channels.
    squares = rounded(torch.square(x)).flatten(2).transpose(1, 2).flatten(0, 1).unsqueeze(1)
    wide = functional.pad(squares, (size // 2, (size - 1) // 2))
    means = (
        functional.avg_pool1d(wide, size, 1).view(x.shape[0], -1, x.shape[1]).transpose(1, 2).reshape(x.shape)
    )
    total = rounded(rounded(means * size) * (alpha / size))
    return x / rounded(rounded(total + k) ** beta)


def _normalized(
    x: Tensor,
    axes: tuple[int, ...],
    gamma: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
    rounded: Rounding,
) -> Tensor:
    centered = in_half(rounded, x - in_half(rounded, mean_of(x, axes, True, rounded)))
    variance = in_half(rounded, mean_of(in_half(rounded, torch.square(centered)), axes, True, rounded))
    y = in_half(rounded, centered * in_half(rounded, torch.rsqrt(in_half(rounded, variance + epsilon))))
    if gamma is not None:
        y = in_half(rounded, y * gamma)
    return y if beta is None else y + beta


def _per_channel(values: Tensor | None, rank: int) -> Tensor | None:
    return None if values is None else values.reshape(-1, *[1] * (rank - 2))
