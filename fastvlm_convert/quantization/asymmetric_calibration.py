"""Aim a layer at the float model's outputs, though its inputs come from quantized layers (arXiv:2504.02692).

With inputs x of the float model and y of the quantized one, `|W x - Q y|^2` is least for
`Q = W (sum x y^T) (sum y y^T)^-1 = W + W (sum (x - y) y^T) H^-1`. A layer whose output is added to the
residual stream also makes up for what has happened to that stream (arXiv:2509.06297): where it is d less than
the float model's, the outputs are aimed at `W x + d`, which adds `(sum d y^T) H^-1`. The remaining mean error
is folded into the bias.
"""

from dataclasses import dataclass, replace

import numpy as np

from fastvlm_convert.quantization.error_compensation import TOKENS, hessian_of
from fastvlm_convert.quantization.linear_algebra import product, solve

RIDGE = 0.1  # share of the mean diagonal: few samples must not bend the weights


@dataclass(frozen=True)
class Drift:
    """What the residual stream that a layer's output is added to lacks: d, the float model's less its own.

    Attributes:
        cross: `sum w d y^T`, float64 [rows, columns].
        mean: Weighted mean of d, float64 [rows].
    """

    cross: np.ndarray
    mean: np.ndarray


@dataclass(frozen=True)
class Moments:
    """Sums over the tokens of a layer's inputs.

    Attributes:
        hessian: `sum w y y^T`, float64 [columns, columns].
        cross: `sum w (x - y) y^T`, float64 [columns, columns].
        reference: Weighted mean of x, float64 [columns].
        mean: Weighted mean of y, float64 [columns].
        drift: What the layer's outputs are to make up for; None where they are added to no residual stream.
    """

    hessian: np.ndarray
    cross: np.ndarray
    reference: np.ndarray
    mean: np.ndarray
    drift: Drift | None = None

    def scaled(self, scales: np.ndarray) -> "Moments":
        """The moments of inputs divided by scales, float32 [columns]."""
        both = np.outer(scales, scales)
        return replace(
            self,
            hessian=self.hessian / both,
            cross=self.cross / both,
            reference=self.reference / scales,
            mean=self.mean / scales,
            drift=self.drift and replace(self.drift, cross=self.drift.cross / scales),
        )


def moments_of(
    reference: np.ndarray, inputs: np.ndarray, weights: np.ndarray | None, drift: np.ndarray | None = None
) -> Moments:
    """Sum over tokens.

    Args:
        reference: x, float32 [tokens, columns].
        inputs: y, float32 [tokens, columns].
        weights: Importance of the tokens, float32 [tokens]; None for equal weights.
        drift: d, float32 [tokens, rows], or None.
    """
    columns = inputs.shape[1]
    cross = np.zeros((columns, columns))
    sums, total = np.zeros((2, columns)), 0.0
    lack = None if drift is None else Drift(np.zeros((drift.shape[1], columns)), np.zeros(drift.shape[1]))
    for start in range(0, len(inputs), TOKENS):
        part = slice(start, start + TOKENS)
        x, y = reference[part], inputs[part]
        w = np.ones(len(y), np.float32) if weights is None else weights[part]
        weighted = y * w[:, None]
        cross += product((x - y).T, weighted)
        sums += np.stack([x.T @ w, y.T @ w])
        total += float(w.sum(dtype=np.float64))
        if drift is not None and lack is not None:
            lack = Drift(lack.cross + product(drift[part].T, weighted), lack.mean + drift[part].T @ w)
    reference_mean, mean = sums / (total or 1.0)
    lack = lack and replace(lack, mean=lack.mean / (total or 1.0))
    return Moments(hessian_of(inputs, weights), cross, reference_mean, mean, lack)


def target_weight(weight: np.ndarray, moments: Moments) -> np.ndarray:
    """The weights to be rounded, float32 [rows, columns]."""
    mean = np.trace(moments.hessian) / len(moments.hessian)
    if mean == 0:
        return weight
    damped = moments.hessian + np.eye(len(moments.hessian)) * (RIDGE * mean)
    missed = weight @ moments.cross
    if moments.drift is not None:
        missed += moments.drift.cross
    pull = solve(damped, missed.T).T  # the damped Hessian is symmetric
    return (weight + pull).astype(np.float32)


def corrected_bias(bias: np.ndarray, weight: np.ndarray, rounded: np.ndarray, moments: Moments) -> np.ndarray:
    """The bias with which the outputs' mean is the float model's, float32 [rows]."""
    drift = 0.0 if moments.drift is None else moments.drift.mean
    return (bias + weight @ moments.reference - rounded @ moments.mean + drift).astype(np.float32)
