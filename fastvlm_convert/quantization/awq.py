"""AWQ: scales per input channel that protect the weights that matter most (arXiv:2306.00978).

`W x = (W diag(s)) (x / s)`, so columns that see large inputs can be stored larger, with less relative error.
The division must cost nothing at run time, so it is folded into what makes x, exactly in real arithmetic:

* x from a norm (RMSNorm, LayerNorm or BatchNorm with weight g and bias b): `g / s`, `b / s`; every layer that
  reads this norm takes the same s (q, k, v; gate, up).
* x from a linear layer or convolution with weight V [columns, ...] and bias b, with nothing or only products
  with other values between: `V / s[:, None]`, `b / s` (up for down: `silu(gate) * up`).

Nothing else is exact: not across GELU, a residual sum, or a norm whose output others read.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from fastvlm_convert.quantization.error_compensation import output_error
from fastvlm_convert.quantization.search import quantize_affine
from fastvlm_convert.quantized.schemes import AffineScheme
from fastvlm_convert.quantized.weight import MixedSource, float_weight
from fastvlm_convert.weights.fold import scaled_columns
from fastvlm_convert.weights.parts import input_group_of
from fastvlm_convert.weights.source import Weight, WeightSource

GRID = tuple(step / 10 for step in range(1, 11))
MOST = 16.0  # of a scale and of its inverse, so that folded weights stay normal float16 numbers


def norm_before(layers: Sequence[str]) -> str | None:
    """The norm into which the scales of the layers' shared input can be folded.

    Returns:
        Its name, or None where that is not exact: no norm gives the input, or other layers read it too.
    """
    group = input_group_of(layers[0])
    return group.norm if group is not None and tuple(layers) == group.layers else None


def behind_scales(floats: WeightSource, quantized: MixedSource) -> dict[str, Weight]:
    """The floats that quantized weights stand for: with the scales that were taken out of their norms.

    Args:
        floats: Canonical names, folded.
        quantized: The same; norms that are not those of `floats` had scales taken out.
    """
    scaled = dict(floats)
    for name, weight in floats.items():
        group = input_group_of(name.removesuffix(".weight"))
        if group is None:
            continue
        gain = f"{group.norm}.weight"
        if quantized[gain] is not floats[gain]:
            scaled[name] = scaled_columns(
                weight, partial(_ratio, floats[gain], float_weight(quantized, gain))
            )
    return scaled


def _ratio(before: Weight, after: Weight) -> np.ndarray:
    """Scales that were taken out of a norm; 1 where its weight is zero, for there they are lost."""
    taken = after.array()
    return np.divide(before.array(), taken, out=np.ones_like(taken), where=taken != 0)


def channel_scales(
    weights: Sequence[np.ndarray], hessian: np.ndarray, scheme: AffineScheme, grid: Sequence[float] = GRID
) -> np.ndarray:
    """The scales with which layers that share an input lose least when they are quantized without data.

    Args:
        weights: float32 [rows, columns] each; all layers that read the input.
        hessian: float64 [columns, columns] of the input, see `gptq.hessian_of`.
        scheme: Of all layers.
        grid: Powers tried of the inputs' magnitudes, and of their quotient with the weights'.

    Returns:
        float32 [columns]; all ones where no scales help.
    """
    stacked = np.concatenate(weights)
    best = np.ones(stacked.shape[1], np.float32)
    least = scaled_error(stacked, hessian, scheme, best)
    for scales in _candidates(stacked, hessian, grid):
        error = scaled_error(stacked, hessian, scheme, scales)
        if error < least:
            best, least = scales, error
    return best


def scaled_error(weight: np.ndarray, hessian: np.ndarray, scheme: AffineScheme, scales: np.ndarray) -> float:
    """Squared error of a layer's outputs when it is quantized behind these scales."""
    importance = (np.diag(hessian) / np.square(scales)).astype(np.float32)
    return output_error(
        weight, quantize_affine(weight * scales, scheme, importance).dequantized() / scales, hessian
    )


def _candidates(weight: np.ndarray, hessian: np.ndarray, grid: Sequence[float]) -> Iterator[np.ndarray]:
    """Powers of the inputs' root mean squares, alone and over the weights' mean magnitudes."""
    inputs = _positive(np.sqrt(np.diag(hessian)))
    magnitudes = _positive(np.abs(weight).mean(0))
    for power in grid:
        yield _centered(inputs**power)
        yield _centered(inputs**power / magnitudes ** (1 - power))


def _positive(values: np.ndarray) -> np.ndarray:
    """Values without zeros, as float64."""
    return np.maximum(values, max(values.max(initial=0) * 1e-4, np.finfo(np.float32).tiny), dtype=np.float64)


def _centered(scales: np.ndarray) -> np.ndarray:
    """Scales around 1 within the limits, float32."""
    centered = scales / np.exp(np.log(scales).mean())
    return np.clip(centered, 1 / MOST, MOST).astype(np.float32)
