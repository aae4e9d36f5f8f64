"""The model as a chain of blocks, one of them in memory at a time: it may be larger than memory."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.utils.hooks import RemovableHandle

from fastvlm_convert.heap import freed_blocks_kept
from fastvlm_convert.model.decoder import DecoderLayer, KVCache, RMSNorm, rotary_table
from fastvlm_convert.model.fastvlm import FastVLM, Uninitialized
from fastvlm_convert.model.projector import Projector
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.parts import EMBEDDING, HEAD
from fastvlm_convert.weights.source import WeightSource

OnInput = Callable[[Tensor], Tensor]
"""Called with the input of a layer; gives what the layer reads in its place."""

OnOutput = Callable[[Tensor], None]
"""Called with what a layer gives."""


class BlockStreamer:
    """Blocks by the prefix of their weights' names, each loaded when asked for.

    Args:
        config: Dimensions.
        weights: Canonical names, folded.
    """

    def __init__(self, config: ModelConfig, weights: WeightSource) -> None:
        self.config = config
        self.weights = weights
        with torch.device("meta"), Uninitialized():
            self._model = FastVLM(config, folded=True).requires_grad_(False).eval()

    def vision_blocks(self) -> list[str]:
        """Encoder and projector in order; each takes and gives one tensor."""
        names = ["vision.stem"]
        for s, stage in enumerate(self.config.vision.stages):
            prefix = f"vision.stages.{s}"
            names += [f"{prefix}.downsample"] if s else []
            names += [f"{prefix}.position"] if stage.has_position else []
            names += [f"{prefix}.blocks.{b}" for b in range(stage.depth)]
        return [*names, "vision.final", "projector"]

    def decoder_blocks(self) -> list[str]:
        """The decoder's layers in order."""
        return [f"decoder.layers.{i}" for i in range(self.config.decoder.num_layers)]

    def load(self, block: str) -> nn.Module:
        """A block with its weights."""
        module = copy.deepcopy(self._model.get_submodule(block))
        state = {name: self.tensor(f"{block}.{name}") for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False)

    def tensor(self, name: str) -> Tensor:
        """One weight, float32."""
        return torch.from_numpy(self.weights[name].array())

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """One block on a batch.

        Args:
            module: What `load` gave.
            x: Pixels or activations [B, C, H, W] in the encoder, [B, T, H] in the decoder, shorter rows
                padded at their end. The projector takes the encoder's last activations.
        """
        if isinstance(module, DecoderLayer):
            decoder, (batch, tokens, _) = self.config.decoder, x.shape
            shape = (batch, decoder.num_kv_heads, tokens, decoder.head_dim)
            cache = KVCache(torch.zeros(shape), torch.zeros(shape))
            x = module(x, *rotary_table(decoder, tokens), cache)
        elif isinstance(module, Projector):
            x = module(x.flatten(2).transpose(1, 2))
        else:
            x = module(x)
        return x

    @torch.no_grad()
    def encode(self, pictures: Sequence[Tensor], on_progress: OnShare = ignore_share) -> Tensor:
        """Image tokens, float32 [images, num_image_tokens, hidden].

        Args:
            pictures: float32 [n, 3, S, S] each, whose images pass side by side; read when their turn comes.
            on_progress: Called with the share of the images that is done, 0..1.
        """
        # Channels last, convolutions take a quarter less time where several threads share them.
        form = torch.channels_last
        modules = [convert_conv2d_weight_memory_format(self.load(b), form) for b in self.vision_blocks()]
        shape = (self.config.vision.num_image_tokens, self.config.decoder.hidden_size)
        features = [torch.zeros(0, *shape)]
        with freed_blocks_kept():  # from picture to picture, too
            for done, pixels in enumerate(pictures):
                x = pixels.contiguous(memory_format=form)
                for module in modules:
                    x = self.run(module, x)
                features.append(x)
                on_progress((done + 1) / len(pictures))
        return torch.cat(features)

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [n] -> float32 [n, hidden]; reads only the rows it needs."""
        table = self.weights[f"{EMBEDDING}.weight"]
        ids, places = torch.unique(token_ids, return_inverse=True)
        rows = [torch.from_numpy(table.read(i, i + 1)) for i in ids.tolist()]
        return torch.cat([torch.zeros(0, table.shape[1]), *rows])[places]

    def logits(self, hidden: Tensor) -> Tensor:
        """Residual stream [n, hidden] -> logits [n, vocab]; the head is read some rows at a time."""
        decoder = self.config.decoder
        norm = RMSNorm(decoder.hidden_size, decoder.norm_eps)
        norm.weight = nn.Parameter(self.tensor("decoder.norm.weight"), requires_grad=False)
        head = self.weights[f"{EMBEDDING if decoder.tied else HEAD}.weight"]
        normed = norm(hidden)
        parts = [functional.linear(normed, torch.from_numpy(rows)) for rows in head.chunks()]
        return torch.cat(parts, -1)[:, : decoder.vocab_size]


@contextmanager
def intercepted(handlers: Mapping[nn.Module, OnInput]) -> Iterator[None]:
    """While the block lasts, the inputs of some layers go through functions before the layers read them."""
    with held([layer.register_forward_pre_hook(_hook(handler)) for layer, handler in handlers.items()]):
        yield


@contextmanager
def shown(handlers: Mapping[nn.Module, OnOutput]) -> Iterator[None]:
    """While the block lasts, functions are shown what some layers give."""
    with held([layer.register_forward_hook(_output_hook(handler)) for layer, handler in handlers.items()]):
        yield


@contextmanager
def held(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """Hooks that are removed where the block ends."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(handler: OnInput) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    return lambda _module, inputs: (handler(*inputs),)


def _output_hook(handler: OnOutput) -> Callable[[nn.Module, object, Tensor], None]:
    return lambda _module, _inputs, output: handler(output)
