"""Solve all layers in the order in which they run.

The samples pass through the float and the quantized model side by side, one block at a time (`block_solver`),
so that no more than a block is in memory.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.progress import OnShare, OnStage, ignore_stage
from fastvlm_convert.quantization.answers import token_batch
from fastvlm_convert.quantization.block_solver import Activations, SolverTask, solve_block
from fastvlm_convert.quantization.limits import MAX_PIXELS
from fastvlm_convert.quantized.weight import AnyWeight, dense_view
from fastvlm_convert.weights.parts import is_language


@dataclass(frozen=True)
class LayerwiseResult:
    """All layers solved.

    Attributes:
        weights: Canonical name -> weight, of the layers and of the floats that changed with them.
        hidden: The residual stream that predicts the answers' tokens, float32 [n, hidden].
        reference: The same of the float model.
    """

    weights: dict[str, AnyWeight]
    hidden: Tensor
    reference: Tensor


@torch.no_grad()
def solve_layerwise(task: SolverTask, on_progress: OnStage = ignore_stage) -> LayerwiseResult:
    """Solve every layer of a task.

    Args:
        task: The layers and the data.
        on_progress: Called with a stage, `encoder` or `layers` (of the decoder), and the share of it that is
            done, 0..1.
    """
    features, weights = _image_tokens(task, partial(on_progress, "encoder"))
    expected = token_batch(task.data.samples, features.reference, task.reference.embed)
    batch = token_batch(task.data.samples, features.quantized, task.quantized.embed)
    scale = task.quantized.config.decoder.residual_scale
    states = Activations(expected.embeds * scale, batch.embeds * scale)
    decoder = task.quantized.decoder_blocks()
    for done, block in enumerate(decoder):
        states, stored = solve_block(task, block, states, batch.real)
        weights |= stored
        on_progress("layers", (done + 1) / len(decoder))
    return LayerwiseResult(weights, states.quantized[batch.answers], states.reference[batch.answers])


def _image_tokens(task: SolverTask, on_progress: OnShare) -> tuple[Activations, dict[str, AnyWeight]]:
    """Image tokens of both models, and the stored weights of the encoder.

    The encoder runs only where its weights are not the float model's; if they are fine, only over held-out
    images, so that the score tells what it does. The first images solve its layers; then the others pass
    through it whole.
    """
    reference = torch.from_numpy(task.data.features)
    floats, weights = task.reference.weights, task.quantized.weights
    is_solved = not all(map(is_language, task.plans))
    is_float = all(weight is floats[name] for name, weight in weights.items() if not is_language(name))
    if is_float and not is_solved:
        return Activations(reference, reference), {}
    pictures = task.data.pictures
    if not is_solved:
        given = task.data.num_fitted_pictures if task.has_fine_encoder else 0
        tokens = task.quantized.encode(pictures[given:], on_progress)
        return Activations(reference, torch.cat([reference[:given], tokens])), {}
    few = max(1, min(task.data.num_fitted_pictures, MAX_PIXELS // pictures.settings.size**2))
    pixels = torch.cat(list(pictures[:few]))
    states = Activations(pixels, pixels)
    del pixels
    found: dict[str, AnyWeight] = {}
    blocks, share = task.quantized.vision_blocks(), few / len(pictures)
    for done, block in enumerate(blocks):
        states, stored = solve_block(task, block, states, None)
        found |= stored
        on_progress(share * (done + 1) / len(blocks))
    encoder = BlockStreamer(task.quantized.config, {**weights, **dense_view(found)})
    others = encoder.encode(pictures[few:], lambda done: on_progress(share + (1 - share) * done))
    return Activations(reference, torch.cat([states.quantized, others])), found
