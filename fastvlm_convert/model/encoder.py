"""Encoder and projector alone, with their layers by name: one picture at a time, without the decoder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastvlm_convert.model.block_streamer import BlockStreamer, held
from fastvlm_convert.model.static_layer import StaticLayer, make_static
from fastvlm_convert.model.vision import Attention
from fastvlm_convert.quantized.weight import MixedSource, dense_view
from fastvlm_convert.weights.model_config import ModelConfig

OnLayer = Callable[[str, Tensor, Tensor], None]


class Encoder:
    """Pixels to projected image tokens.

    Args:
        config: Dimensions.
        weights: Canonical names, folded; with static quantization where they say so.

    Attributes:
        layers: Convolutions and linear layers by name.
        static: Those that multiply integers.
    """

    def __init__(self, config: ModelConfig, weights: MixedSource) -> None:
        self._streamer = BlockStreamer(config, dense_view(weights))
        self._blocks: list[nn.Module] = []
        self.layers: dict[str, nn.Module] = {}
        self.static: dict[str, StaticLayer] = {}
        self._attentions: dict[str, nn.Module] = {}
        self._block_of: dict[str, int] = {}
        for number, name in enumerate(self._streamer.vision_blocks()):
            block = self._streamer.load(name).eval()
            # A block may be a layer itself, which can only be replaced within another module.
            held = nn.ModuleDict({"block": block})
            self.static |= make_static(held, weights, name, "block")
            self._blocks.append(held["block"])
            for path, module in held.named_modules():
                path = f"{name}{path.removeprefix('block')}".removesuffix(".layer")
                if isinstance(module, nn.Conv2d | nn.Linear):
                    self.layers[path] = module
                    self._block_of[path] = number
                elif isinstance(module, Attention):
                    self._attentions[path] = module

    @torch.no_grad()
    def run(self, pixel_values: Tensor) -> Tensor:
        """float32 [1, 3, S, S] -> [num_image_tokens, hidden]; S may be other than the config's."""
        return self._through(0, pixel_values)

    @torch.no_grad()
    def states(self, pixel_values: Tensor) -> Iterator[Tensor]:
        """What each block reads, pixels first, and what the last one gives."""
        x = pixel_values
        yield x
        for block in self._blocks:
            x = self._streamer.run(block, x)
            yield x

    @torch.no_grad()
    def run_from(self, layer: str, states: Sequence[Tensor]) -> Tensor:
        """As `run`, of what `states` gave, where nothing has changed before the block that holds a layer."""
        first = self._block_of[layer]
        return self._through(first, states[first])

    def _through(self, first: int, x: Tensor) -> Tensor:
        """What the last block gives, of what one block reads; no state is kept longer than it is needed."""
        for block in self._blocks[first:]:
            x = self._streamer.run(block, x)
        return x[0]

    @contextmanager
    def watched(self, on_layer: OnLayer) -> Iterator[None]:
        """While the block lasts, a function gets name, input and output of every layer that runs.

        Attention's own products are reported as a layer whose name ends in `attention`.
        """
        hooks = [
            module.register_forward_hook(_hook(name, on_layer))
            for layers in (self.layers, self._attentions)
            for name, module in layers.items()
        ]
        with held(hooks):
            yield


def _hook(name: str, on_layer: OnLayer) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
    return lambda _module, x, y: on_layer(name, x[0], y)


def multiplications(encoder: Encoder, pixel_values: Tensor) -> Mapping[str, int]:
    """How many each layer does for one picture; attention's own products under its block's `attention`."""
    counts: dict[str, int] = {}

    def count(name: str, x: Tensor, y: Tensor) -> None:
        layer = encoder.layers.get(name)
        if layer is None:
            counts[name] = 2 * x.shape[1] * x.numel()
        else:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            counts[name] = y.numel() * weight[0].numel()

    with encoder.watched(count):
        encoder.run(pixel_values)
    return counts
