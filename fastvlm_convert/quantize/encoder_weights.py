"""How much the answers feel an error at each place of the encoder's activations.

The backward pass of `token_weights` goes on from the image tokens through projector and encoder. A Hessian weighs
a place by the root mean square of its gradient, half-way (in powers) between what an error there costs and equal
weights: few places carry most of the cost, and a Hessian of few places would forget the others.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm_convert.model.chain import Chain

OnProgress = Callable[[float], None]

MAX_BYTES = 1 << 30  # of the activations between blocks that a backward pass keeps


def encoder_weights(
    chain: Chain, pixel_values: Tensor, gradient: Tensor, on_progress: OnProgress
) -> dict[str, Tensor]:
    """Layer -> weight of every place, float32 [images, places].

    Args:
        chain: The float model.
        pixel_values: float32 [images, 3, S, S].
        gradient: At the image tokens, float32 [images, num_image_tokens, hidden].
        on_progress: Called with the share that is done, 0..1.
    """
    modules = {block: chain.load(block) for block in chain.vision_blocks()}
    found: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_full_backward_hook(_watch(f"{block}.{name}", found))
        for block, module in modules.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
    ]
    together = _fitting(chain, modules, pixel_values[:1])
    images = zip(torch.split(pixel_values, together), torch.split(gradient, together), strict=True)
    for done, (pixels, felt) in enumerate(images):
        _backward(chain, modules, pixels, felt)
        on_progress(min(1.0, (done + 1) * together / len(pixel_values)))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def _watch(name: str, found: dict[str, list[Tensor]]) -> Callable[[nn.Module, Any, Any], None]:
    def look(_module: nn.Module, _inputs: Any, given: Any) -> None:  # noqa: ANN401
        channels = 1 if given[0].ndim == 4 else -1
        found.setdefault(name, []).append(given[0].square().mean(channels).sqrt().flatten(1))

    return look


def _fitting(chain: Chain, modules: Mapping[str, nn.Module], image: Tensor) -> int:
    """Images whose activations between blocks stay below the limit; at least one."""
    size, x = 0, image
    with torch.no_grad():
        for module in modules.values():
            x = chain.run(module, x)
            size += 4 * x.numel()
    return max(1, MAX_BYTES // size)


def _backward(chain: Chain, modules: Mapping[str, nn.Module], pixels: Tensor, gradient: Tensor) -> None:
    inputs, x = [], pixels
    with torch.no_grad():
        for module in modules.values():
            inputs.append(x)
            x = chain.run(module, x)
    for module, kept in zip(reversed(modules.values()), reversed(inputs), strict=True):
        leaf = kept.detach().requires_grad_()
        with torch.enable_grad():
            y = chain.run(module, leaf)
        (gradient,) = torch.autograd.grad(y, leaf, gradient)
