"""Aim a layer at the float model's outputs, though its inputs come from quantized layers (arXiv:2504.02692).

With inputs x of the float model and y of the quantized one, `|W x - Q y|^2` is least for
`Q = W (sum x y^T) (sum y y^T)^-1 = W + W (sum (x - y) y^T) H^-1`. The remaining mean error is folded into the
bias.
"""

from dataclasses import dataclass

import numpy as np

from fastvlm_convert.quantization.error_compensation import TOKENS, hessian_of
from fastvlm_convert.quantization.linear_algebra import product, solve

RIDGE = 0.1  # share of the mean diagonal: few samples must not bend the weights


@dataclass(frozen=True)
class Moments:
    """Sums over the tokens of a layer's inputs.

    Attributes:
        hessian: `sum w y y^T`, float64 [columns, columns].
        cross: `sum w (x - y) y^T`, float64 [columns, columns].
        reference: Weighted mean of x, float64 [columns].
        mean: Weighted mean of y, float64 [columns].
    """

    hessian: np.ndarray
    cross: np.ndarray
    reference: np.ndarray
    mean: np.ndarray

    def scaled(self, scales: np.ndarray) -> "Moments":
        """The moments of inputs divided by scales, float32 [columns]."""
        both = np.outer(scales, scales)
        return Moments(self.hessian / both, self.cross / both, self.reference / scales, self.mean / scales)


def moments_of(reference: np.ndarray, inputs: np.ndarray, weights: np.ndarray | None) -> Moments:
    """Sum over tokens.

    Args:
        reference: x, float32 [tokens, columns].
        inputs: y, float32 [tokens, columns].
        weights: Importance of the tokens, float32 [tokens]; None for equal weights.
    """
    columns = inputs.shape[1]
    cross = np.zeros((columns, columns))
    sums, total = np.zeros((2, columns)), 0.0
    for start in range(0, len(inputs), TOKENS):
        x, y = (part[start : start + TOKENS] for part in (reference, inputs))
        w = np.ones(len(y), np.float32) if weights is None else weights[start : start + TOKENS]
        cross += product((x - y).T, y * w[:, None])
        sums += np.stack([x.T @ w, y.T @ w])
        total += float(w.sum(dtype=np.float64))
    reference_mean, mean = sums / (total or 1.0)
    return Moments(hessian_of(inputs, weights), cross, reference_mean, mean)


def target_weight(weight: np.ndarray, moments: Moments) -> np.ndarray:
    """The weights to be rounded, float32 [rows, columns]."""
    mean = np.trace(moments.hessian) / len(moments.hessian)
    if mean == 0:
        return weight
    damped = moments.hessian + np.eye(len(moments.hessian)) * (RIDGE * mean)
    pull = solve(damped, (weight @ moments.cross).T).T  # the damped Hessian is symmetric
    return (weight + pull).astype(np.float32)


def corrected_bias(bias: np.ndarray, weight: np.ndarray, rounded: np.ndarray, moments: Moments) -> np.ndarray:
    """The bias with which the outputs' mean is the float model's, float32 [rows]."""
    return (bias + weight @ moments.reference - rounded @ moments.mean).astype(np.float32)
