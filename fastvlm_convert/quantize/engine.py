"""The weights that a recipe makes of a checkpoint: what exporters write and the reference can hold."""

from collections.abc import Callable

from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.checkpoint.quantized import check_recipe
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.quantize.apply import quantize_weights
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.plan import LayerPlan, plan_layers
from fastvlm_convert.weights.quantized import MixedSource

OnProgress = Callable[[str, float], None]


def plan_checkpoint(checkpoint: Checkpoint, recipe: Recipe) -> tuple[LayerPlan, ...]:
    """What a recipe does to every layer of a checkpoint, or did where it is quantized; reads no weight.

    Raises:
        RecipeError: The rules do not fit the model, or are others than a quantized checkpoint's.
    """
    if checkpoint.quantized is not None:
        check_recipe(checkpoint.quantized.record, recipe, checkpoint.path)
        return checkpoint.quantized.record.plans
    return plan_layers({name: weight.shape for name, weight in checkpoint.folded.items()}, recipe)


def engine_weights(
    checkpoint: Checkpoint, recipe: Recipe, on_progress: OnProgress = lambda stage, share: None
) -> MixedSource:
    """Fold and quantize: canonical names, integers where planned. A quantized checkpoint has both done.

    Args:
        checkpoint: The checkpoint.
        recipe: Its `quantize` and `calibration` sections.
        on_progress: Called with the name of the stage and the share of it that is done, 0..1.

    Raises:
        RecipeError: The rules do not fit the model, or are others than a quantized checkpoint's.
    """
    plans = plan_checkpoint(checkpoint, recipe)
    if checkpoint.quantized is not None:
        return checkpoint.quantized.weights
    if recipe.is_calibrated:
        raise RecipeError("solvers that need data are not joined in yet")
    return quantize_weights(fold(checkpoint.weights), plans)
