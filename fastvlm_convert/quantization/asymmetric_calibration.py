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
class Lack:
    """What inputs or outputs of a layer lack: d, the float model's less the quantized model's.

    Attributes:
        cross: `sum w d y^T`, float64 [columns or rows, columns].
        mean: Weighted mean of d, float64 [columns or rows].
    """

    cross: np.ndarray
    mean: np.ndarray


@dataclass(frozen=True)
class Moments:
    """Sums over the tokens of a layer's inputs.

    Attributes:
        hessian: `sum w y y^T`, float64 [columns, columns].
        mean: Weighted mean of y, float64 [columns].
        inputs: What the inputs lack, x - y; None where `outputs` holds what comes of it.
        outputs: What the outputs are to make up for besides; None where there is nothing.
    """

    hessian: np.ndarray
    mean: np.ndarray
    inputs: Lack | None = None
    outputs: Lack | None = None

    def scaled(self, scales: np.ndarray) -> "Moments":
        """The moments of inputs divided by scales, float32 [columns]."""
        both = np.outer(scales, scales)
        return Moments(
            self.hessian / both,
            self.mean / scales,
            self.inputs and Lack(self.inputs.cross / both, self.inputs.mean / scales),
            self.outputs and replace(self.outputs, cross=self.outputs.cross / scales),
        )


def moments_of(
    inputs: np.ndarray,
    weights: np.ndarray | None,
    *,
    reference: np.ndarray | None = None,
    missing: np.ndarray | None = None,
) -> Moments:
    """Sum over tokens.

    What a layer misses because its inputs are not the float model's is either found from those, or given: a
    layer with fewer outputs than inputs has less to remember and to multiply that way.

    Args:
        inputs: y, float32 [tokens, columns].
        weights: Importance of the tokens, float32 [tokens]; None for equal weights.
        reference: x, float32 [tokens, columns], or None.
        missing: What the outputs are to make up for, float32 [tokens, rows]: without `reference`
            `W x - W y + d`, with it d alone; or None.
    """
    columns, total = inputs.shape[1], 0.0
    mean = np.zeros(columns)
    lacks = [
        None if given is None else Lack(np.zeros((given.shape[1], columns)), np.zeros(given.shape[1]))
        for given in (reference, missing)
    ]
    for start in range(0, len(inputs), TOKENS):
        part = slice(start, start + TOKENS)
        y = inputs[part]
        w = np.ones(len(y), np.float32) if weights is None else weights[part]
        weighted = y * w[:, None]
        mean += y.T @ w
        total += float(w.sum(dtype=np.float64))
        found = (
            None if reference is None else reference[part] - y,
            None if missing is None else missing[part],
        )
        for lack, values in zip(lacks, found, strict=True):
            if lack is not None and values is not None:
                np.add(lack.cross, product(values.T, weighted), out=lack.cross)
                np.add(lack.mean, values.T @ w, out=lack.mean)
    count = total or 1.0
    means = (lack and replace(lack, mean=lack.mean / count) for lack in lacks)
    return Moments(hessian_of(inputs, weights), mean / count, *means)


def target_weight(weight: np.ndarray, moments: Moments) -> np.ndarray:
    """The weights to be rounded, float32 [rows, columns]."""
    mean = np.trace(moments.hessian) / len(moments.hessian)
    if mean == 0:
        return weight
    missed = np.zeros(weight.shape)
    if moments.inputs is not None:
        missed += weight @ moments.inputs.cross
    if moments.outputs is not None:
        missed += moments.outputs.cross
    damped = moments.hessian.copy()
    np.einsum("ii->i", damped)[...] += RIDGE * mean
    pull = solve(damped, missed.T).T  # the damped Hessian is symmetric
    return (weight + pull).astype(np.float32)


def corrected_bias(bias: np.ndarray, weight: np.ndarray, rounded: np.ndarray, moments: Moments) -> np.ndarray:
    """The bias with which the outputs' mean is the float model's, float32 [rows]."""
    shifted = bias + (weight - rounded) @ moments.mean
    if moments.inputs is not None:
        shifted += weight @ moments.inputs.mean
    if moments.outputs is not None:
        shifted += moments.outputs.mean
    return shifted.astype(np.float32)
