"""Layers to quantize, and a plain GPTQ to compare with."""

import numpy as np

from fastvlm_convert.quantization.error_compensation import hessian_of
from fastvlm_convert.quantized.schemes import AffineScheme


def weights(seed: int, rows: int = 24, columns: int = 256) -> np.ndarray:
    """Weights with heavy tails whose rows and columns differ in size, float32."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(5, (rows, columns))
    values *= np.exp(0.4 * rng.standard_normal((rows, 1))) * np.exp(0.3 * rng.standard_normal(columns))
    return (0.02 * values).astype(np.float32)


def correlated_inputs(seed: int, columns: int = 256, tokens: int = 2000) -> np.ndarray:
    """Inputs of which a few directions and channels carry most, with a mean, float32 [tokens, columns]."""
    rng = np.random.default_rng(1000 + seed)
    spectrum = (1 + np.arange(columns)) ** -0.8
    mixing = rng.standard_normal((columns, columns)) * spectrum[:, None]
    inputs = rng.standard_normal((tokens, columns)) @ mixing + 0.2 * rng.standard_normal(columns)
    inputs *= np.exp(0.5 * rng.standard_normal(columns))
    return inputs.astype(np.float32)


def correlated_hessian(seed: int, columns: int = 256) -> np.ndarray:
    """Their second moments, float64."""
    return hessian_of(correlated_inputs(seed, columns))


def textbook_gptq(weight: np.ndarray, hessian: np.ndarray, scheme: AffineScheme) -> np.ndarray:
    """One-shot GPTQ as its authors' code does it: asymmetric ranges, static groups, activation order.

    Upper Cholesky factor of the inverse, one column at a time, all in float64 but for the float16 scales.
    """
    rows, columns = weight.shape
    size = scheme.block_size or columns
    blocks = weight.reshape(rows, -1, size).astype(np.float64)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    last = scheme.levels - 1
    scale = np.maximum((high - low) / last, 1e-7).astype(np.float16).astype(np.float64)
    zero = np.clip(np.rint(-low / scale), 0, last)

    order = np.argsort(-np.diag(hessian), kind="stable")
    damped = hessian[np.ix_(order, order)] + 0.01 * np.diag(hessian).mean() * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = weight[:, order].astype(np.float64)
    result = np.empty((rows, columns))
    for place, column in enumerate(order):
        s, z = scale[:, column // size], zero[:, column // size]
        rounded = (np.clip(np.rint(left[:, place] / s) + z, 0, last) - z) * s
        result[:, column] = rounded
        error = (left[:, place] - rounded) / upper[place, place]
        left[:, place:] -= error[:, None] * upper[place, place:]
    return result.astype(np.float32)
