"""Which part of the model a layer belongs to, and which layers read the same input.

Names are canonical, of layers (`decoder.layers.0.mlp.up_proj`) or of their tensors
(`decoder.layers.0.mlp.up_proj.weight`). No other module decides by a name's prefix.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

Part = Literal["vision", "projector", "decoder", "head", "embedding"]
PARTS: Final[tuple[Part, ...]] = ("vision", "projector", "decoder", "head", "embedding")

EMBEDDING: Final = "decoder.embed_tokens"
HEAD: Final = "decoder.lm_head"

_PREFIXES: Final[tuple[tuple[str, Part], ...]] = (  # the first match decides
    ("vision.", "vision"),
    ("projector.", "projector"),
    (f"{HEAD}.", "head"),
    (f"{EMBEDDING}.", "embedding"),
    ("decoder.", "decoder"),
)


def part_of(name: str) -> Part:
    """The part that a layer or tensor belongs to; a table that head and embedding share is the embedding's.

    Raises:
        ValueError: The name is not canonical.
    """
    for prefix, part in _PREFIXES:
        if f"{name}.".startswith(prefix):
            return part
    raise ValueError(f"'{name}' belongs to no part of the model")


def is_language(name: str) -> bool:
    """Whether a layer or tensor works on tokens (decoder, head, embedding), not on images."""
    return part_of(name) in ("decoder", "head", "embedding")


@dataclass(frozen=True)
class InputGroup:
    """All layers that read one input.

    Attributes:
        layers: Their names, in the order in which the weights are stacked.
        norm: Name of the norm that makes the input; no other layer reads it.
        is_stacked: Whether exporters store the weights as one matrix.
    """

    layers: tuple[str, ...]
    norm: str
    is_stacked: bool


# Within a decoder layer or an encoder block. Every other layer has its input for itself.
_INPUT_GROUPS: Final = (
    InputGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", True),
    InputGroup(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", False),
    InputGroup(("attention.qkv",), "norm", False),
)


# Within a decoder layer or an encoder block: a layer whose output is added to the residual stream -> what
# reads that stream before.
_STREAM_READERS: Final = {
    "self_attn.o_proj": "input_layernorm",
    "mlp.down_proj": "post_attention_layernorm",
    "attention.proj": "norm",
    "ffn.fc2": "ffn.conv",
}


def stream_reader_of(layer: str) -> str | None:
    """The module that reads the residual stream which a layer's output is added to.

    Returns:
        None where it is added to none.
    """
    for member, reader in _STREAM_READERS.items():
        if layer.endswith(f".{member}"):
            return layer.removesuffix(member) + reader
    return None


def input_group_of(layer: str) -> InputGroup | None:
    """The group that a layer is in, with its names in full; None where its input is not that of a group."""
    for group in _INPUT_GROUPS:
        for member in group.layers:
            if layer.endswith(f".{member}"):
                block = layer.removesuffix(member)
                return InputGroup(
                    tuple(block + other for other in group.layers), block + group.norm, group.is_stacked
                )
    return None


def by_shared_input(layers: Iterable[str]) -> list[tuple[str, ...]]:
    """Layers in groups that read the same input, in the order in which they are given."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        group = input_group_of(layer)
        groups.setdefault(layer if group is None else group.layers[0], []).append(layer)
    return [tuple(members) for members in groups.values()]
