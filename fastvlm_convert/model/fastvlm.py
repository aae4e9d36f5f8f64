"""FastVLM: encoder, projector and decoder joined, with weights loaded from a `WeightSource`."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastvlm_convert.model.decoder import Qwen2
from fastvlm_convert.model.projector import Projector
from fastvlm_convert.model.vision import FastViTHD
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.parts import EMBEDDING
from fastvlm_convert.weights.source import Weight, WeightSource


class FastVLM(nn.Module):
    """The whole model in float32.

    Args:
        config: Its dimensions.
        folded: Build the form in which BatchNorm and LayerScale are part of the weights beside them.
    """

    def __init__(self, config: ModelConfig, folded: bool = False) -> None:
        super().__init__()
        self.config = config
        self.vision = FastViTHD(config.vision, folded)
        self.projector = Projector(
            config.vision.output_width, config.projector_width, config.decoder.hidden_size
        )
        self.decoder = Qwen2(config.decoder)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """float32 [B, 3, S, S] -> projected image tokens [B, num_image_tokens, hidden]."""
        return self.projector(self.vision(pixel_values))


class Uninitialized(TorchFunctionMode):
    """While it is entered, new modules draw no weights: on the meta device that would load half of torch."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  what the function gives
        """Hand calls on, except those of `torch.nn.init`."""
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def load_model(
    config: ModelConfig,
    weights: WeightSource,
    folded: bool = False,
    on_progress: OnShare = ignore_share,
) -> FastVLM:
    """Build the model and read its weights, one tensor at a time.

    Args:
        config: Its dimensions.
        weights: Canonical names; must match the model exactly.
        folded: Whether `weights` are folded (see `weights.fold`).
        on_progress: Called with the share of the weights read so far, 0..1.

    Returns:
        The model in float32 and evaluation mode.
    """
    with torch.device("meta"), Uninitialized():
        model = FastVLM(config, folded)
    _load(model, "", weights, on_progress)
    return model


def load_decoder(config: ModelConfig, weights: WeightSource) -> Qwen2:
    """The decoder alone, as `load_model` gives it."""
    with torch.device("meta"), Uninitialized():
        decoder = Qwen2(config.decoder)
    _load(decoder, EMBEDDING.removesuffix("embed_tokens"), weights, ignore_share)
    return decoder


def _load(model: nn.Module, prefix: str, weights: WeightSource, on_progress: OnShare) -> None:
    """Put weights, whose names begin with a prefix, into a model without any."""
    names = [n for n in model.state_dict() if not n.endswith("num_batches_tracked")]
    read = [weights[prefix + name] for name in names]
    total, done = sum(weight.size for weight in read), 0
    state = {}
    # NumPy lets other threads run while it converts.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, weight, values in zip(names, read, pool.map(Weight.array, read), strict=True):
            state[name] = torch.from_numpy(values)
            done += weight.size
            on_progress(done / total)
    state |= {
        n: torch.zeros((), dtype=torch.long) for n in model.state_dict() if n.endswith("num_batches_tracked")
    }
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False).eval()
