"""The language model under the names that mlx-vlm and Apple's app share."""

from collections.abc import Iterator
from typing import Final

from fastvlm_convert.exporters.mlx.support import AUTO_COMPUTE
from fastvlm_convert.exporters.mlx.weights import NamedWeight
from fastvlm_convert.quantized.layer_plan import float_storage
from fastvlm_convert.quantized.weight import AffineSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.parts import is_language, part_of

_ROOT: Final = "language_model.model"


def build_decoder(weights: AffineSource, recipe: Recipe) -> Iterator[NamedWeight]:
    """The embedding, the layers, the last norm and, unless it is the embedding, the head.

    Args:
        weights: Canonical names.
        recipe: Precisions.
    """
    compute = recipe.decoder.on(AUTO_COMPUTE).compute
    for name in filter(is_language, weights):
        storage = float_storage(name, recipe)
        is_table = part_of(name) == "embedding"
        yield NamedWeight(language_name(name), weights[name], storage, compute, is_table)


def language_name(name: str) -> str:
    """What clients call a layer or tensor of the language model."""
    _, _, rest = name.partition(".")
    return f"language_model.{rest}" if part_of(name) == "head" else f"{_ROOT}.{rest}"
