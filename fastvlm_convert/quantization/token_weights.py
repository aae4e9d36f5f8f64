"""How sensitive the answers are to an error at each token: what a Hessian weighs its inputs by.

An image gives far more tokens than its question, but errors there matter less, and of the text's tokens
some matter far more than others (MBQ, arXiv:2412.19509; VLMQ, arXiv:2508.03351). To second order the
divergence of the answers is `1/2 sum_a dz_a^T F_a dz_a`, with dz the change of the logits and
`F = diag(p) - p p^T`. One backward pass of a random vector with covariance F gives each layer's output a
gradient g with `E[(g . dy)^2] = dy^T J^T F J dy`: the mean square of g at a token is what an error costs.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.progress import OnShare
from fastvlm_convert.quantization.answers import TokenBatch
from fastvlm_convert.quantization.limits import AVERAGED_SAMPLES, LOGIT_ROWS, SAMPLES_BACK
from fastvlm_convert.recipe_settings import CalibrationSettings

SEED = 0


def measured_weights(
    model: BlockStreamer, batch: TokenBatch, settings: CalibrationSettings, on_progress: OnShare
) -> dict[str, Tensor]:
    """The weight of every token of samples at every layer of the decoder.

    Args:
        model: The float model.
        batch: The samples.
        settings: What is told apart.
        on_progress: Called with the share that is done, 0..1.

    Returns:
        Layer -> float32 [samples, tokens], zero where padded; empty where all tokens have equal weights.
    """
    if settings.token_weights == "uniform":
        return {}
    if settings.token_weights == "token":
        return squared_gradients(model, batch, on_progress)
    with_picture = batch.image.any(1).nonzero().flatten()[:AVERAGED_SAMPLES]
    few = batch.samples(with_picture) if len(with_picture) else batch.first(AVERAGED_SAMPLES)
    found = squared_gradients(model, few, on_progress)
    return {layer: spread(averaged(weights, few), batch) for layer, weights in found.items()}


def squared_gradients(model: BlockStreamer, batch: TokenBatch, on_progress: OnShare) -> dict[str, Tensor]:
    """Run the float decoder over samples, layer by layer, and back again.

    Args:
        model: The float model.
        batch: The samples.
        on_progress: Called with the share that is done, 0..1.

    Returns:
        Layer -> mean squared gradient of its outputs, float32 [samples, tokens]; zero where padded.
    """
    blocks = model.decoder_blocks()
    steps = len(blocks) * 4  # a backward pass takes three times a forward one
    weights: dict[str, Tensor] = {}
    with _spilling() as spill:
        x, inputs = batch.embeds * model.config.decoder.residual_scale, []
        for done, block in enumerate(blocks):
            inputs.append(spill(x))
            x = _forward(model, model.load(block), x)
            on_progress((done + 1) / steps)
        gradient = torch.zeros_like(x)
        gradient[batch.answers] = _probe(model, x[batch.answers])
        for done, (block, given) in enumerate(zip(reversed(blocks), reversed(inputs), strict=True)):
            gradient, squares = _backward(model, block, given, gradient)
            weights |= squares
            on_progress((len(blocks) + 3 * (done + 1)) / steps)
    return weights


def averaged(weights: Tensor, batch: TokenBatch) -> tuple[float, float]:
    """Mean weight of image tokens, and of text tokens; 0 where there are none.

    Args:
        weights: [samples, tokens].
        batch: The samples.
    """
    image, text = (weights[tokens] for tokens in (batch.image, batch.real & ~batch.image))
    return float(image.mean()) if len(image) else 0.0, float(text.mean()) if len(text) else 0.0


def spread(means: tuple[float, float], batch: TokenBatch) -> Tensor:
    """The first weight at image tokens, the second at text tokens, 0 where padded; [samples, tokens].

    Text of samples without a picture weighs no more in all than text beside pictures, which answers are for:
    more of it makes its share better known, not larger.
    """
    image, text = means
    is_text = batch.real & ~batch.image
    has_picture = batch.image.any(1, keepdim=True)
    beside, alone = (int((is_text & rows).sum()) for rows in (has_picture, ~has_picture))
    share = min(1.0, beside / alone) if beside and alone else 1.0
    weights = torch.where(has_picture, text, share * text)
    return torch.where(batch.image, image, torch.where(batch.real, weights, 0.0))


@torch.no_grad()
def _forward(model: BlockStreamer, block: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model.run(block, part) for part in torch.split(x, SAMPLES_BACK)])


def _probe(model: BlockStreamer, hidden: Tensor) -> Tensor:
    """Gradient of `v . logits` with `v = sqrt(p) * noise - p (sqrt(p) . noise)`, whose covariance is F."""
    noise = torch.Generator().manual_seed(SEED)
    parts: list[Tensor] = []
    for rows in torch.split(hidden, LOGIT_ROWS):
        leaf = rows.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = model.logits(leaf)
            p = torch.softmax(logits.detach(), -1)
            drawn = p.sqrt() * torch.randn(p.shape, generator=noise)
            probe = ((drawn - p * drawn.sum(-1, keepdim=True)) * logits).sum()
        parts.extend(torch.autograd.grad(probe, leaf))
    return torch.cat(parts)


def _backward(
    model: BlockStreamer, name: str, given: np.ndarray, gradient: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pass a gradient back through a block, some samples at a time.

    Args:
        model: The float model.
        name: The block.
        given: Its input, float32 [samples, tokens, hidden].
        gradient: At its output, of the same shape.

    Returns:
        The gradient at its input; and by layer the mean square at its output, float32 [samples, tokens].
    """
    block = model.load(name)
    squares: dict[str, list[Tensor]] = {}

    def watch(layer: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _m, _i, grads: squares.setdefault(layer, []).append(grads[0].square().mean(-1))

    for layer, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(watch(f"{name}.{layer}"))
    parts: list[Tensor] = []
    for start in range(0, len(given), SAMPLES_BACK):
        leaf = torch.from_numpy(np.array(given[start : start + SAMPLES_BACK])).requires_grad_()
        with torch.enable_grad():
            y = model.run(block, leaf)
        parts.extend(torch.autograd.grad(y, leaf, gradient[start : start + SAMPLES_BACK]))
    return torch.cat(parts), {layer: torch.cat(found) for layer, found in squares.items()}


@contextmanager
def _spilling() -> Iterator[Callable[[Tensor], np.ndarray]]:
    """Puts tensors into files until the block ends, so that a deep model's inputs do not fill the memory."""
    with tempfile.TemporaryDirectory(prefix="fastvlm-convert-") as folder:
        count = 0

        def spill(x: Tensor) -> np.ndarray:
            nonlocal count
            path = Path(folder) / f"{count}.npy"
            count += 1
            np.save(path, x.numpy())
            mapped: np.ndarray = np.load(path, mmap_mode="r")
            return mapped

        yield spill
