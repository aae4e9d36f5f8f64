"""What stands inside a package for the people who use it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fastvlm_convert import io_names as names
from fastvlm_convert.exporters.coreml.paths import APPLE_PACKAGE, DECODER_PACKAGE, VISION_PACKAGE
from fastvlm_convert.exporters.coreml.vision import APPLE_INPUT
from fastvlm_convert.manifest import Contract
from fastvlm_convert.recipe import Recipe

AUTHOR: Final = "FastVLM by Apple, converted by fastvlm-convert"

DESCRIPTIONS: Final = {
    VISION_PACKAGE: "FastVLM image encoder and projector: a picture to image tokens.",
    DECODER_PACKAGE: "FastVLM language model: embeddings to the next token's logits, with a KV cache.",
    APPLE_PACKAGE: "FastVLM image encoder without projector, for Apple's FastVLM app.",
}
FEATURES: Final = {
    names.IMAGE: "RGB picture, made square as image_mode says; scaled to 0..1 inside",
    names.PIXEL_VALUES: "RGB in 0..1, channels first",
    names.IMAGE_FEATURES: "projected image tokens; they take the place of <image> in the prompt's embeddings",
    names.INPUT_IDS: "token ids",
    names.INPUTS_EMBEDS: "embeddings of the tokens, image features spliced in; pad a chunk at its end",
    names.POSITION: "tokens already in the cache; a multiple of the chunk for prefill",
    names.LAST_INDEX: "row of the chunk whose logits are wanted: its last real token",
    names.KEY_CACHE: "keys of all layers; zeros for a new conversation",
    names.VALUE_CACHE: "values of all layers; zeros for a new conversation",
    names.KEY_CACHE_OUT: "k_cache for the next call",
    names.VALUE_CACHE_OUT: "v_cache for the next call",
    names.LOGITS: "logits of the next token",
    APPLE_INPUT: "RGB in 0..1, channels first",
}


@dataclass(frozen=True)
class Metadata:
    """What is said of a package.

    Attributes:
        description: One paragraph.
        license: Name of the model's license file.
        details: More facts by name.
        features: Description of every input, output and state by name.
    """

    description: str
    license: str
    details: Mapping[str, str]
    features: Mapping[str, str]


def metadata_of(package: str, license: str, contract: Contract, recipe: Recipe) -> Metadata:
    """What is said of one of a bundle's packages."""
    details = {
        "prompt": contract.prompt,
        "image_mode": contract.image_mode,
        "image_size": str(contract.image_size),
        "num_image_tokens": str(contract.num_image_tokens),
        "context_length": str(contract.context_length),
        "prefill_chunk": str(recipe.coreml.prefill_chunk),
        "eos_token_ids": ", ".join(str(i) for i in contract.eos_token_ids),
        "recipe": recipe.name,
    }
    return Metadata(DESCRIPTIONS[package], license, details, FEATURES)
