"""What an export will write and need, from dimensions and settings: no weight is read, no library loaded.

The exporters themselves run, on weights without content and into files that only count. Every size is exact
but for the metadata inside Core ML's programs, some hundred bytes that depend on more than dimensions.
"""

from collections.abc import Sequence

from fastvlm_convert.exporters.coreml.sizes import coreml_dry_run
from fastvlm_convert.exporters.onnx.sizes import onnx_dry_run
from fastvlm_convert.manifest import Target
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import ModelConfig


def predicted_sizes(
    config: ModelConfig,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    targets: Sequence[Target],
    *,
    image_token_id: int = 0,
) -> dict[str, int]:
    """Bytes of every graph, program and weight file that an export writes.

    Args:
        config: Dimensions, with the image size to export.
        plans: What happens to the layers.
        recipe: Its other settings.
        targets: Formats, whose checks have passed.
        image_token_id: The ONNX embedding has a row for it, even where the checkpoint's table ends before.

    Returns:
        Path relative to the bundle -> bytes. The files beside them, for clients, do not depend on the plans.
    """
    weights = placeholder_weights(config, plans)
    sizes: dict[str, int] = {}
    if "onnx" in targets:
        sizes |= onnx_dry_run(config, weights, recipe, image_token_id)[1]
    if "coreml" in targets:
        sizes |= coreml_dry_run(config, weights, recipe)[1]
    return sizes


def cache_bytes(config: ModelConfig, recipe: Recipe, target: Target, context_length: int) -> int:
    """Bytes of the KV cache of so many tokens: float16 as Core ML state, else in the decoder's dtype."""
    decoder = config.decoder
    is_state = target == "coreml" and recipe.coreml.kv_cache == "state"
    item = 2 if is_state or recipe.decoder.compute == "float16" else 4
    return 2 * item * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * context_length
