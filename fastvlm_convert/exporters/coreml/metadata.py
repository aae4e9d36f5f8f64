"""What stands inside a package for the people who use it; Xcode shows it when a package is opened."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fastvlm_convert import __version__
from fastvlm_convert import io_names as names
from fastvlm_convert.exporters.coreml.paths import APPLE_PACKAGE, VISION_PACKAGE, decoder_package
from fastvlm_convert.exporters.coreml.vision import APPLE_INPUT
from fastvlm_convert.exporters.job import Statement
from fastvlm_convert.recipe import Recipe

AUTHOR: Final = "fastvlm-convert, from a FastVLM checkpoint"

_DESCRIPTIONS: Final = {
    VISION_PACKAGE: "FastVLM image encoder and projector: a picture to image tokens.",
    decoder_package(None): "FastVLM language model: embeddings to the next token's logits, with a KV cache.",
    APPLE_PACKAGE: "FastVLM image encoder without projector, for Apple's FastVLM app.",
}
_STRETCH: Final = (
    "Layers of FastVLM's language model, with their KV cache; the packages run one after the other."
)
_VISION: Final = {
    names.IMAGE: "RGB picture, made square as image_mode says; scaled to 0..1 inside",
    names.PIXEL_VALUES: "RGB in 0..1, channels first; the picture is made square as image_mode says",
    names.IMAGE_FEATURES: "projected image tokens; they take the place of <image> in the prompt's embeddings",
}
# Of a single function by "function/name"; else of all that have the name.
_DECODER: Final = {
    names.INPUT_IDS: "token ids",
    f"{names.EMBED}/{names.INPUTS_EMBEDS}": "one row for each token id",
    f"{names.PREFILL}/{names.INPUTS_EMBEDS}": (
        "a chunk of the prompt's embeddings, image features spliced in; the last chunk is padded at its end"
    ),
    names.INPUTS_EMBEDS: "embeddings of the tokens to append; of the prompt, with image features spliced in",
    f"{names.PREFILL}/{names.POSITION}": (
        "tokens already in the cache; position and chunk together must fit into the context"
    ),
    names.POSITION: "tokens already in the cache",
    names.LAST_INDEX: "row of the chunk whose logits are wanted: its last real token",
    names.KEY_CACHE: "keys of all layers; zeros for a new conversation",
    names.VALUE_CACHE: "values of all layers; zeros for a new conversation",
    names.KEY_CACHE_OUT: "k_cache for the next call",
    names.VALUE_CACHE_OUT: "v_cache for the next call",
    names.HIDDEN_STATES: "hidden_states_out of the package before",
    names.HIDDEN_STATES_OUT: "what the next package takes as hidden_states",
    names.LOGITS: "a score for each token id to come next",
}
_APPLE: Final = {
    APPLE_INPUT: "RGB in 0..1, channels first",
    names.IMAGE_FEATURES: "features of the encoder, not yet projected: the app does that itself",
}
_FEATURES: Final[dict[str, dict[str, str]]] = {VISION_PACKAGE: _VISION, APPLE_PACKAGE: _APPLE}


@dataclass(frozen=True)
class Metadata:
    """What is said of a package.

    Attributes:
        description: One paragraph.
        license: Text of the model's license.
        details: More facts by name.
        features: Description of every input, output and state by name, or by "function/name" where one
            function needs another.
        version: Of the converter.
    """

    description: str
    license: str
    details: Mapping[str, str]
    features: Mapping[str, str]
    version: str = __version__

    def feature(self, function: str, name: str) -> str:
        """Description of an input, an output or a state of a function, whatever number it has."""
        function = function.rstrip("0123456789").removesuffix("_")
        return self.features.get(f"{function}/{name}") or self.features[name]


def description_of(package: str) -> str:
    """One paragraph about one of a bundle's packages."""
    return _DESCRIPTIONS.get(package, _STRETCH)


def features_of(package: str) -> Mapping[str, str]:
    """Descriptions of a package's inputs, outputs and states."""
    return _FEATURES.get(package, _DECODER)


def metadata_of(package: str, statement: Statement, recipe: Recipe) -> Metadata:
    """What is said of one of a bundle's packages."""
    contract = statement.contract
    details = {
        "image_size": str(contract.image_size),
        "num_image_tokens": str(contract.num_image_tokens),
        "recipe": recipe.name,
    }
    if package == VISION_PACKAGE:
        details["image_mode"] = contract.image_mode
    if package == decoder_package(None):
        details |= {
            "prompt": contract.prompt,
            "context_length": str(contract.context_length),
            "prefill_chunk": str(recipe.coreml.prefill_chunk),
            "eos_token_ids": ", ".join(str(i) for i in contract.eos_token_ids),
        }
    return Metadata(description_of(package), statement.license, details, features_of(package))
