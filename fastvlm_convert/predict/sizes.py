"""What an export will write, from dimensions and settings: no weight is read, no library loaded.

The exporters themselves run, on weights without content and into files that only count. With a checkpoint at
hand every size is exact; without one, what Core ML's programs say of the model is estimated.
"""

from collections.abc import Sequence

from fastvlm_convert.exporters.backends import Prediction, backend_of, decoder_settings
from fastvlm_convert.exporters.job import Statement
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.quantized.activations import bits_of
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.targets import Target
from fastvlm_convert.weights.model_config import ModelConfig


def predict_artifacts(
    config: ModelConfig,
    layers: Sequence[LayerPlan],
    recipe: Recipe,
    targets: Sequence[Target],
    statement: Statement | None = None,
) -> Prediction:
    """Every graph, program and weight file that an export writes.

    The files beside them, for clients, do not depend on the layers.

    Args:
        config: Dimensions, with the image size to export.
        layers: What happens to the layers.
        recipe: Its other settings.
        targets: Formats, whose checks have passed.
        statement: What files say of the model; None where no checkpoint is at hand. An embedding may have a
            row for the contract's image token, even where the checkpoint's table ends before.
    """
    weights = placeholder_weights(config, layers, bits_of(recipe))
    found = [backend_of(target).predict(config, weights, recipe, statement) for target in targets]
    return Prediction(
        sizes={name: size for part in found for name, size in part.sizes.items()},
        artifacts=[artifact for part in found for artifact in part.artifacts],
        notes=[note for part in found for note in part.notes],
    )


def cache_bytes(config: ModelConfig, recipe: Recipe, target: Target, context_length: int) -> int:
    """Bytes of the KV cache of so many tokens."""
    decoder = config.decoder
    compute = decoder_settings(recipe, target).compute
    is_half = compute == "float16" or backend_of(target).has_float16_cache(recipe)
    item = 2 if is_half else 4
    return 2 * item * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * context_length
