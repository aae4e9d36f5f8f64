"""Merge the train-time branches of FastViT blocks into the one convolution each block runs as.

Sources: MobileOne (arXiv:2206.04040), FastViT (arXiv:2303.14189); the branches of Apple's and of
timm's code arrive here under the same names (see `checkpoint/layouts.py`):

    X.branches.K.{conv,bn}   k x k convolution with BatchNorm
    X.pointwise.{conv,bn}    1 x 1 convolution with BatchNorm
    X.identity               BatchNorm of the input itself
    X.large / X.small        7 x 7 and smaller convolution of a downsampling, each with BatchNorm
    X.mixer / X.norm / X.layer_scale   RepMixer: x + layer_scale * (mixer(x) - norm(x))
    X.position_conv          position encoding: x + conv(x)
"""

import re

import numpy as np

from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.weights.fold import BATCH_NORM_PARTS, batch_norm_affine
from fastvlm_convert.weights.source import Weight, WeightSource, computed

Kernel = tuple[np.ndarray, np.ndarray]  # float64 weight [out, in / groups, k, k] and bias [out]
Parts = dict[str, Weight]  # the tensors of one block; each is taken out as it is merged


def reparameterize(weights: WeightSource, convolutions: list[str]) -> dict[str, Weight]:
    """A view in which each of `convolutions` has a `weight` and a `bias` and no branches.

    Args:
        weights: Canonical names, possibly with branches.
        convolutions: Names of the blocks that run as one convolution.

    Raises:
        CheckpointError: A block lacks a tensor of one of its branches, or has one that fits nowhere.
    """
    merged = dict(weights)
    for block in convolutions:
        branches = sorted(name for name in weights if name.startswith(block + "."))
        if set(branches) <= {f"{block}.weight", f"{block}.bias"}:
            continue
        if f"{block}.weight" in branches:
            raise CheckpointError(
                f"'{block}' has both a merged convolution and train-time branches",
                hint="export the model again, either before or after reparameterization",
            )
        dtype = merged[branches[0]].dtype
        parts = {name: merged.pop(name) for name in branches}
        try:
            weight, bias = _merge(parts, block)
        except (ValueError, IndexError) as error:  # numpy's, for shapes that do not go together
            raise CheckpointError(f"the train-time branches of '{block}' do not fit together") from error
        if parts:
            raise CheckpointError(f"'{min(parts)}' belongs to no branch of '{block}'")
        merged[f"{block}.weight"] = computed(weight.shape, dtype, weight.copy)
        merged[f"{block}.bias"] = computed(bias.shape, dtype, bias.copy)
    return merged


def _merge(parts: Parts, block: str) -> Kernel:
    if _has(parts, f"{block}.mixer"):
        return _merge_mixer(parts, block)
    if _has(parts, f"{block}.position_conv"):
        weight = _take(parts, f"{block}.position_conv.weight")
        return weight + _identity_kernel(weight.shape), _take(parts, f"{block}.position_conv.bias")
    if _has(parts, f"{block}.large"):
        weight, bias = _conv_bn(parts, f"{block}.large")
        if _has(parts, f"{block}.small"):
            small, small_bias = _conv_bn(parts, f"{block}.small")
            weight, bias = weight + _pad_to(small, weight.shape), bias + small_bias
        return weight, bias
    return _merge_mobile_one(parts, block, None)


def _merge_mixer(parts: Parts, block: str) -> Kernel:
    mixer, mixer_bias = _merge_mobile_one(parts, f"{block}.mixer", None)
    norm, norm_bias = _merge_mobile_one(parts, f"{block}.norm", mixer.shape)
    weight, bias = mixer - norm, mixer_bias - norm_bias
    if f"{block}.layer_scale" in parts:
        scale = _take(parts, f"{block}.layer_scale").reshape(-1)
        weight, bias = weight * scale[:, None, None, None], bias * scale
    return weight + _identity_kernel(weight.shape), bias


def _merge_mobile_one(parts: Parts, block: str, shape: tuple[int, ...] | None) -> Kernel:
    """Sum the branches of a MobileOne block; `shape` is needed where only the identity is left."""
    pattern = re.compile(rf"{re.escape(block)}\.branches\.\d+(?=\.)")
    branches = sorted({match[0] for name in parts if (match := pattern.match(name))})
    kernels = [_conv_bn(parts, branch) for branch in branches]
    if kernels:
        shape = kernels[0][0].shape
    if shape is None:
        raise CheckpointError(f"'{block}' has train-time branches but no convolution among them")
    if _has(parts, f"{block}.pointwise"):
        pointwise, bias = _conv_bn(parts, f"{block}.pointwise")
        kernels.append((_pad_to(pointwise, shape), bias))
    if _has(parts, f"{block}.identity"):
        scale, shift = _batch_norm(parts, f"{block}.identity")
        kernels.append((_identity_kernel(shape) * scale[:, None, None, None], shift))
    if not kernels:
        raise CheckpointError(f"the train-time branches of '{block}' are missing")
    weight, bias = kernels[0]
    for branch_weight, branch_bias in kernels[1:]:
        weight, bias = weight + branch_weight, bias + branch_bias
    return weight, bias


def _conv_bn(parts: Parts, branch: str) -> Kernel:
    weight = _take(parts, f"{branch}.conv.weight")
    scale, shift = _batch_norm(parts, f"{branch}.bn")
    return weight * scale[:, None, None, None], shift


def _batch_norm(parts: Parts, name: str) -> Kernel:
    return batch_norm_affine(name, *(_take(parts, f"{name}.{part}") for part in BATCH_NORM_PARTS))


def _has(parts: Parts, module: str) -> bool:
    return any(name.startswith(f"{module}.") for name in parts)


def _take(parts: Parts, name: str) -> np.ndarray:
    if name not in parts:
        raise CheckpointError(f"train-time tensor '{name}' is missing")
    return parts.pop(name).array().astype(np.float64)


def _identity_kernel(shape: tuple[int, ...]) -> np.ndarray:
    out, group, height, width = shape
    kernel = np.zeros(shape)
    kernel[np.arange(out), np.arange(out) % group, height // 2, width // 2] = 1
    return kernel


def _pad_to(kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    pad = (shape[2] - kernel.shape[2]) // 2
    return np.pad(kernel, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
