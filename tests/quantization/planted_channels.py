"""A copy of the demo whose encoder has channels of very different sizes, and the same function."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.model.fastvlm import FastVLM, load_model
from fastvlm_convert.preprocess import pixel_values
from fastvlm_convert.questions import Question
from fastvlm_convert.weights.fold import fold
from tests.checkpoints import read_tensors
from tests.planted import DEMO, copy_demo

_FACTORS = torch.tensor([2.0**4, 2.0**-3])  # of large channels and of others: exact in any float
_LARGE = 8  # one channel in so many


def plant(folder: Path) -> Path:
    """Scale channels between two layers, and back in the second: a few are 128 times as large."""
    tensors, generator = read_tensors(DEMO), torch.Generator().manual_seed(0)

    def factors(count: int) -> torch.Tensor:
        is_large = torch.randperm(count, generator=generator) < count // _LARGE
        return torch.where(is_large, *_FACTORS).half()

    for name in list(tensors):
        block, found, _ = name.partition("convffn.fc1.weight")
        if found:
            scale = factors(tensors[name].shape[1])
            for part in ("weight", "bias"):
                tensors[f"{block}convffn.conv.bn.{part}"] *= scale
            tensors[name] /= scale.view(1, -1, 1, 1)
        block, found, _ = name.partition("token_mixer.qkv.weight")
        if found:
            scale = factors(tensors[name].shape[1])
            for part in ("weight", "bias"):
                tensors[f"{block}norm.{part}"] *= scale
            tensors[name] /= scale
            scale = factors(tensors[name].shape[1])
            tensors[name][-len(scale) :] *= scale[:, None]
            tensors[f"{block}token_mixer.proj.weight"] /= scale
    return copy_demo(folder, tensors)


def pictures(checkpoint: Path, questions: tuple[Question, ...]) -> torch.Tensor:
    """Pixels of the questions' pictures, float32 [n, 3, S, S]."""
    settings = open_checkpoint(checkpoint).pictures.image
    return torch.from_numpy(np.concatenate([pixel_values(i, settings) for q in questions for i in q.images]))


def float_model(checkpoint: Path) -> FastVLM:
    """The reference, folded."""
    opened = open_checkpoint(checkpoint)
    return load_model(opened.config, fold(opened.weights), folded=True)


@torch.no_grad()
def plainly_quantized(model: FastVLM, seen: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Image tokens of plain post-training quantization: ranges from least to most, one for each tensor.

    Weights are int8 per channel; what every convolution and linear layer reads is uint8.

    Args:
        model: Is changed.
        seen: Pictures that ranges are taken from.
        asked: Pictures whose image tokens are wanted.
    """
    ranges: dict[nn.Module, tuple[float, float]] = {}
    layers = [
        module
        for part in (model.vision, model.projector)
        for module in part.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]

    def see(module: nn.Module, given: tuple[torch.Tensor]) -> None:
        ranges[module] = (min(0.0, float(given[0].min())), max(0.0, float(given[0].max())))

    def round_input(module: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        least, most = ranges[module]
        scale = (most - least) / 255
        zero = round(-least / scale)
        return (torch.fake_quantize_per_tensor_affine(given[0], scale, zero, 0, 255),)

    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    model.encode_image(seen)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        scale = layer.weight.abs().flatten(1).amax(1) / 127
        zeros = torch.zeros(len(scale), dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(layer.weight, scale, zeros, 0, -127, 127)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    hooks = [layer.register_forward_pre_hook(round_input) for layer in layers]
    return model.encode_image(asked)
