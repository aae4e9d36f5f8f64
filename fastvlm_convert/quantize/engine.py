"""The weights that a recipe makes of a checkpoint: what exporters write and the reference can hold."""

from collections.abc import Callable

from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.quantize.apply import quantize_weights
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.fp16_safe import fp16_safe
from fastvlm_convert.weights.plan import LayerPlan, plan_layers
from fastvlm_convert.weights.quantized import MixedSource

OnProgress = Callable[[str, float], None]


def plan_checkpoint(checkpoint: Checkpoint, recipe: Recipe) -> tuple[LayerPlan, ...]:
    """What a recipe does to every layer of a checkpoint; reads no weight.

    Raises:
        RecipeError: The rules do not fit the model.
    """
    folded = fold(checkpoint.weights)
    return plan_layers({name: weight.shape for name, weight in folded.items()}, recipe)


def engine_weights(
    checkpoint: Checkpoint, recipe: Recipe, on_progress: OnProgress = lambda stage, share: None
) -> MixedSource:
    """Fold, repair and quantize: canonical names, integers where planned.

    Args:
        checkpoint: The checkpoint.
        recipe: Its `quantize`, `calibration` and `repairs` sections.
        on_progress: Called with the name of the stage and the share of it that is done, 0..1.

    Raises:
        RecipeError: The rules do not fit the model.
    """
    plans = plan_checkpoint(checkpoint, recipe)
    if recipe.is_calibrated:
        raise RecipeError("solvers that need data are not joined in yet")
    repaired = fp16_safe(fold(checkpoint.weights), checkpoint.config.decoder, recipe.repairs)
    return quantize_weights(repaired, plans)
