"""How sensitive the answers are to an error at each token: what a Hessian weighs its inputs by.

An image gives far more tokens than its question, but errors there matter less, and of the text's tokens
some matter far more than others (MBQ, arXiv:2412.19509; VLMQ, arXiv:2508.03351). To second order the
divergence of the answers is `1/2 sum_a dz_a^T F_a dz_a`, with dz the change of the logits and
`F = diag(p) - p p^T`. One backward pass of a random vector with covariance F gives each layer's output a
gradient g with `E[(g . dy)^2] = dy^T J^T F J dy`: the mean square of g at a token is what an error costs.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.progress import OnShare
from fastvlm_convert.quantization.answers import TokenBatch
from fastvlm_convert.quantization.limits import LOGIT_ROWS

SAMPLES = 8  # run side by side: bounds the memory that a backward pass takes
SEED = 0


@dataclass(frozen=True)
class FloatPass:
    """What a pass of the float decoder gives.

    Attributes:
        hidden: The residual stream that predicts the answers' tokens, float32 [n, hidden].
        weights: Layer -> mean squared gradient of its outputs, float32 [samples, tokens]; zero where padded.
            Empty where no backward pass was asked for.
    """

    hidden: Tensor
    weights: Mapping[str, Tensor]


def float_pass(model: BlockStreamer, batch: TokenBatch, backward: bool, on_progress: OnShare) -> FloatPass:
    """Run the float decoder over all samples, layer by layer, and back again where that is wanted.

    Args:
        model: The float model.
        batch: The samples.
        backward: Whether to measure how sensitive the answers are to errors.
        on_progress: Called with the share that is done, 0..1.
    """
    blocks = model.decoder_blocks()
    steps = len(blocks) * (4 if backward else 1)  # a backward pass takes three times a forward one
    with _spilling() as spill:
        x, inputs = batch.embeds * model.config.decoder.residual_scale, []
        for done, block in enumerate(blocks):
            if backward:
                inputs.append(spill(x))
            x = _forward(model, model.load(block), x)
            on_progress((done + 1) / steps)
        hidden = x[batch.answers]
        if not backward:
            return FloatPass(hidden, {})
        gradient = torch.zeros_like(x)
        gradient[batch.answers] = _probe(model, hidden)
        weights: dict[str, Tensor] = {}
        for done, (block, given) in enumerate(zip(reversed(blocks), reversed(inputs), strict=True)):
            gradient, squares = _backward(model, block, given, gradient)
            weights |= squares
            on_progress((len(blocks) + 3 * (done + 1)) / steps)
    return FloatPass(hidden, weights)


def averaged(weights: Tensor, batch: TokenBatch, num_fitted: int) -> Tensor:
    """The same weight for all image tokens, and for all text tokens: their means, [samples, tokens].

    Args:
        weights: [samples, tokens].
        batch: The samples.
        num_fitted: How many of them, the first, are looked at; the others tell nothing.
    """
    fitted = torch.arange(len(weights))[:, None] < num_fitted
    text = batch.real & ~batch.image
    result = torch.zeros_like(weights)
    for tokens in (batch.image, text):
        if (tokens & fitted).any():
            result[tokens] = weights[tokens & fitted].mean()
    return result


@torch.no_grad()
def _forward(model: BlockStreamer, block: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model.run(block, part) for part in torch.split(x, SAMPLES)])


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
    for start in range(0, len(given), SAMPLES):
        leaf = torch.from_numpy(np.array(given[start : start + SAMPLES])).requires_grad_()
        with torch.enable_grad():
            y = model.run(block, leaf)
        parts.extend(torch.autograd.grad(y, leaf, gradient[start : start + SAMPLES]))
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
