"""What the config.json of each folder says beside the model's dimensions."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from fastvlm_convert.exporters.mlx.decoder import language_name
from fastvlm_convert.exporters.mlx.groups import (
    GROUP_SIZES,
    QuantizedLayer,
    group_size,
    planned_layers,
    shared_group_size,
)
from fastvlm_convert.exporters.mlx.lower import FOLDER
from fastvlm_convert.exporters.mlx.vision import LIBRARY_PROJECTOR, PROJECTION_DIM
from fastvlm_convert.io_names import APPLE_FOLDER
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import ModelConfig

_IMAGE_TOKEN_INDEX: Final = (
    -200
)  # what mlx-vlm's processor puts in place of a picture, whatever the tokenizer

Quantization = dict[str, Any]


def app_folders(
    config: ModelConfig, recipe: Recipe, layers: Sequence[LayerPlan]
) -> dict[str, dict[str, Any]]:
    """The folders, and what their config.json says that others do not.

    Args:
        config: Dimensions.
        recipe: Settings.
        layers: What happens to the layers.
    """
    del config
    quantized = planned_layers(layers)
    library: dict[str, Any] = {
        "image_token_index": _IMAGE_TOKEN_INDEX,
        "vision_config": {"model_type": "llava_qwen2", "projection_dim": PROJECTION_DIM},
        "tokenizer_model_max_length": recipe.common.max_context_length,
        "tokenizer_padding_side": "right",
        **_quantization(quantized, GROUP_SIZES),
    }
    if not recipe.coreml.drop_in:
        return {FOLDER: library}
    size = shared_group_size(quantized)
    return {FOLDER: library, APPLE_FOLDER: _quantization(quantized, () if size is None else (size,))}


def _quantization(layers: Iterable[QuantizedLayer], allowed: Sequence[int]) -> dict[str, Quantization]:
    """The groups that most layers have, and by module those of the others; nothing without integers."""
    sizes = ((layer, group_size(layer, allowed)) for layer in layers)
    groups = {_module(layer.layer): (size, layer.scheme.bits) for layer, size in sizes if size is not None}
    if not groups:
        return {}
    ((most, _),) = Counter(groups.values()).most_common(1)
    others = {module: _words(*group) for module, group in groups.items() if group != most}
    return {"quantization": {**_words(*most), **others}}


def _words(size: int, bits: int) -> Quantization:
    return {"group_size": size, "bits": bits}


def _module(layer: str) -> str:
    return LIBRARY_PROJECTOR.get(layer) or language_name(layer)
