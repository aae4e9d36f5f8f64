"""Random numbers, drawn in each run from the seed that the program gives: equal runs are equal."""

import torch

from fastvlm_convert.mil.ops.table import Ints, Limit, Tensor, op


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(max(seed, 0))


@op("random_bernoulli")
def random_bernoulli(shape: Ints, limit: Limit, prob: float = 0.5, seed: int = -1) -> Tensor:
    """1 with a probability, else 0."""
    return torch.bernoulli(torch.full(tuple(limit.check(shape)), prob), generator=_generator(seed))


@op("random_categorical")
def random_categorical(
    x: Tensor, limit: Limit, mode: str = "logits", size: int = 1, seed: int = -1
) -> Tensor:
    """Indices along the last axis, drawn with the probabilities it holds."""
    if mode not in ("logits", "probs"):
        raise ValueError(f"unknown mode '{mode}'")
    limit.check([*x.shape[:-1], size])
    weights = torch.softmax(x, -1) if mode == "logits" else x
    drawn = torch.multinomial(weights.reshape(-1, x.shape[-1]), size, True, generator=_generator(seed))
    return drawn.reshape(*x.shape[:-1], size).float()


@op("random_normal")
def random_normal(
    shape: Ints, limit: Limit, mean: float = 0.0, stddev: float = 1.0, seed: int = -1
) -> Tensor:
    """Numbers of a normal distribution."""
    return torch.randn(tuple(limit.check(shape)), generator=_generator(seed)) * stddev + mean


@op("random_uniform")
def random_uniform(shape: Ints, limit: Limit, low: float = 0.0, high: float = 1.0, seed: int = -1) -> Tensor:
    """Numbers between low and high, all equally likely."""
    return torch.rand(tuple(limit.check(shape)), generator=_generator(seed)) * (high - low) + low
