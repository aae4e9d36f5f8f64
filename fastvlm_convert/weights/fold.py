"""Fold BatchNorm and LayerScale into the weights beside them.

Both are linear at inference, so folding is exact in real arithmetic; it is computed in float64.
"""

from collections.abc import Callable, Mapping

import numpy as np

from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.io_names import VISION_NORM_EPS
from fastvlm_convert.weights.source import Weight, WeightSource, computed
from fastvlm_convert.weights.storage import checked


def fold(weights: WeightSource) -> dict[str, Weight]:
    """A view in which `ffn.bn`, `attention_scale` and `ffn_scale` are gone.

    `ffn.conv` gains a bias; `ffn.fc2` and `attention.proj` carry the layer scales.
    """
    folded = dict(weights)
    for name in weights:
        if name.endswith(".ffn.bn.weight"):
            _fold_batch_norm(folded, name.removesuffix(".bn.weight"))
        elif name.endswith(".ffn_scale"):
            _fold_scale(folded, name, name.removesuffix("_scale") + ".fc2")
        elif name.endswith(".attention_scale"):
            _fold_scale(folded, name, name.removesuffix("_scale") + ".proj")
    return checked(folded, weights, "folding BatchNorm and layer scales")


def folded_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what `fold` makes of weights with these shapes."""
    unread = {name: computed(shape, "float32", lambda: np.zeros(0)) for name, shape in shapes.items()}
    return {name: weight.shape for name, weight in fold(unread).items()}


BATCH_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


def batch_norm_affine(
    name: str, weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, var: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """BatchNorm at inference as `scale * x + shift`, both [channels], float64.

    Raises:
        CheckpointError: The running variance of the BatchNorm `name` is negative.
    """
    if (var < 0).any():
        raise CheckpointError(f"'{name}.running_var' is negative; the checkpoint is damaged")
    scale = weight.astype(np.float64) / np.sqrt(var.astype(np.float64) + VISION_NORM_EPS)
    return scale, bias - mean * scale


def _fold_batch_norm(weights: dict[str, Weight], ffn: str) -> None:
    parts = [weights.pop(f"{ffn}.bn.{part}") for part in BATCH_NORM_PARTS]
    conv = weights[f"{ffn}.conv.weight"]

    def affine() -> tuple[np.ndarray, np.ndarray]:
        return batch_norm_affine(f"{ffn}.bn", *(part.array() for part in parts))

    weights[f"{ffn}.conv.weight"] = scaled_rows(conv, lambda: affine()[0])
    weights[f"{ffn}.conv.bias"] = computed(conv.shape[:1], parts[1].dtype, lambda: affine()[1])


def _fold_scale(weights: dict[str, Weight], scale_name: str, layer: str) -> None:
    scale = weights.pop(scale_name)
    for name in (f"{layer}.weight", f"{layer}.bias"):
        weights[name] = scaled_rows(weights[name], scale.array)


def scaled_rows(weight: Weight, scale: Callable[[], np.ndarray]) -> Weight:
    """A weight whose rows are multiplied by what `scale` returns, [rows]; computed in float64."""

    def read(start: int, stop: int) -> np.ndarray:
        rows = weight.read(start, stop)
        factors = scale()[start:stop].astype(np.float64)
        scaled: np.ndarray = rows * factors.reshape(-1, *[1] * (rows.ndim - 1))
        return scaled.astype(np.float32)

    return Weight(weight.shape, weight.dtype, read)


def scaled_columns(weight: Weight, scale: Callable[[], np.ndarray]) -> Weight:
    """A matrix whose columns are multiplied by what `scale` returns, float32 [columns]."""

    def read(start: int, stop: int) -> np.ndarray:
        return weight.read(start, stop) * scale()

    return Weight(weight.shape, weight.dtype, read)
