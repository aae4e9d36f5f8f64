"""Solve all layers in the order in which they run.

The samples pass through the float and the quantized model side by side, one block at a time (`block_solver`),
so that no more than a block is in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.quantization.answers import token_batch
from fastvlm_convert.quantization.block_solver import Activations, SolverTask, solve_block
from fastvlm_convert.quantization.limits import MAX_PIXELS, PIXELS_TOGETHER
from fastvlm_convert.quantized.weight import AnyWeight, dense_view
from fastvlm_convert.weights.parts import is_language


@dataclass(frozen=True)
class LayerwiseResult:
    """All layers solved.

    Attributes:
        weights: Canonical name -> weight, of the layers and of the floats that changed with them.
        hidden: The residual stream that predicts the answers' tokens, float32 [n, hidden].
    """

    weights: dict[str, AnyWeight]
    hidden: Tensor


@torch.no_grad()
def solve_layerwise(task: SolverTask, on_progress: OnShare = ignore_share) -> LayerwiseResult:
    """Solve every layer of a task.

    Args:
        task: The layers and the data.
        on_progress: Called with the share of the blocks that is done, 0..1.
    """
    vision, decoder = task.quantized.vision_blocks(), task.quantized.decoder_blocks()
    total = len(vision) + len(decoder)
    features, weights = _image_tokens(task, lambda done: on_progress(done / total))
    expected = token_batch(task.data.samples, features.reference, task.reference.embed)
    batch = token_batch(task.data.samples, features.quantized, task.quantized.embed)
    scale = task.quantized.config.decoder.residual_scale
    states = Activations(expected.embeds * scale, batch.embeds * scale)
    for done, block in enumerate(decoder):
        states, stored = solve_block(task, block, states, batch.real)
        weights |= stored
        on_progress((len(vision) + done + 1) / total)
    return LayerwiseResult(weights, states.quantized[batch.answers])


def _image_tokens(
    task: SolverTask, on_block: Callable[[int], None]
) -> tuple[Activations, dict[str, AnyWeight]]:
    """Image tokens of both models, and the stored weights of the encoder.

    The encoder runs only where its weights are not the float model's. The first images solve its layers; then
    the others pass through it whole.
    """
    reference = torch.from_numpy(task.data.features)
    floats, weights = task.reference.weights, task.quantized.weights
    is_solved = not all(map(is_language, task.plans))
    is_float = all(weight is floats[name] for name, weight in weights.items() if not is_language(name))
    if is_float and not is_solved:
        return Activations(reference, reference), {}
    pixels = torch.from_numpy(task.data.pixel_values)
    if not is_solved:
        return Activations(reference, _encoded(task.quantized, pixels)), {}
    few = max(1, min(task.data.num_fitted_pictures, MAX_PIXELS // pixels[0, 0].numel()))
    states = Activations(pixels[:few], pixels[:few])
    found: dict[str, AnyWeight] = {}
    for done, block in enumerate(task.quantized.vision_blocks()):
        states, stored = solve_block(task, block, states, None)
        found |= stored
        on_block(done + 1)
    encoder = BlockStreamer(task.quantized.config, {**weights, **dense_view(found)})
    return Activations(reference, torch.cat([states.quantized, _encoded(encoder, pixels[few:])])), found


def _encoded(model: BlockStreamer, pixels: Tensor) -> Tensor:
    """Image tokens, float32 [images, num_image_tokens, hidden]; some images at a time through all blocks."""
    modules = [model.load(block) for block in model.vision_blocks()]
    shape = (model.config.vision.num_image_tokens, model.config.decoder.hidden_size)
    features = [torch.zeros(0, *shape)]
    for part in torch.split(pixels, max(1, PIXELS_TOGETHER // (pixels.shape[-1] ** 2))):
        for module in modules:
            part = model.run(module, part)
        features.append(part)
    return torch.cat(features)
