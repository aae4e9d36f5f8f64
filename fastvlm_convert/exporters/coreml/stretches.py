"""Which layers of a decoder go into which package, where one would be too large."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from fastvlm_convert.arithmetic import ceil_div
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.exporters.coreml.data import ALIGNMENT, is_inline
from fastvlm_convert.exporters.coreml.decoder import Stretch
from fastvlm_convert.exporters.coreml.graph import Constant, Graph, num_bytes
from fastvlm_convert.weights.model_config import DecoderConfig

_LAYER: Final = re.compile(r"l(\d+)_")
_END: Final = ("lm_head_", "final_norm_")  # what only the last package holds
_EMBEDDING: Final = "embed_tokens_"
_MB: Final = 10**6


def stretches(graphs: Sequence[Graph], config: DecoderConfig, max_mb: float) -> list[Stretch]:
    """Cut a decoder into as few packages as a limit allows; all but the first are as full as it allows.

    Args:
        graphs: The functions of the decoder in one package, the look-up of embeddings among them.
        config: Its dimensions.
        max_mb: Megabytes (10^6 bytes) of weights that a package may hold.

    Returns:
        At least one, in the order in which they run.

    Raises:
        RecipeError: A layer is larger, alone or with the table that must be in its package.
    """
    num_layers, limit = config.num_layers, max_mb * _MB
    layers, shared = _bytes(graphs, config)
    if sum(layers) + shared <= limit:
        return [Stretch(range(num_layers), is_first=True, is_last=True)]
    largest = max(range(num_layers), key=lambda layer: layers[layer])
    if (needed := layers[largest] + shared) > limit:
        raise RecipeError(
            f"coreml.split_larger_than_mb is {max_mb:g}, but layer {largest}, with what must be in its "
            f"package, takes {needed / _MB:.1f} MB",
            hint=f"allow {ceil_div(needed, _MB)} or more, or fewer bits",
        )
    starts, size = [num_layers], shared
    for layer in reversed(range(num_layers)):
        if size + layers[layer] > limit:
            starts.append(layer + 1)
            size = shared
        size += layers[layer]
    starts.append(0)
    return [
        Stretch(range(first, stop), is_first=first == 0, is_last=stop == num_layers)
        for first, stop in pairwise(reversed(starts))
    ]


def _bytes(graphs: Sequence[Graph], config: DecoderConfig) -> tuple[list[int], int]:
    """Bytes of weights: of each layer with the tables that go with it, and of what every package needs."""
    layers = [0] * config.num_layers
    shared = ALIGNMENT
    for name, constant in _constants(graphs).items():
        stored = num_bytes(constant.dtype, constant.shape)
        size = 0 if is_inline(constant.shape) else (ceil_div(stored, ALIGNMENT) + 1) * ALIGNMENT
        if found := _LAYER.match(name):
            layers[int(found[1])] += size
        elif name.startswith(_END) or (name.startswith(_EMBEDDING) and config.tied):
            layers[-1] += size
        elif name.startswith(_EMBEDDING):
            layers[0] += size
        else:
            shared += size
    return layers, shared


def _constants(graphs: Sequence[Graph]) -> dict[str, Constant]:
    """Every array of a package once."""
    constants = (
        (graph, node.inputs["val"]) for graph in graphs for node in graph.nodes if node.kind == "const"
    )
    return {
        constant.name if constant.is_shared else f"{graph.name}/{constant.name}": constant
        for graph, constant in constants
    }
