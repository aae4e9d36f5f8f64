"""The weights that a recipe makes of a checkpoint: what exporters write and the reference can hold."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.checkpoint.quantized_checkpoint import check_recipe
from fastvlm_convert.errors import MissingDependencyError, RecipeError
from fastvlm_convert.preprocess import ImageMode
from fastvlm_convert.quantization.awq import behind_scales
from fastvlm_convert.quantization.calibration import Calibration, read_calibration
from fastvlm_convert.quantization.data_free import quantize_weights
from fastvlm_convert.quantization.score import AnswerScore
from fastvlm_convert.quantized.layer_plan import LayerPlan, plan_layers
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.model_config import at_image_size
from fastvlm_convert.weights.rescale import fp16_safe
from fastvlm_convert.weights.source import WeightSource

OnProgress = Callable[[str, float], None]


@dataclass(frozen=True)
class PreparedWeights:
    """A checkpoint's weights as a recipe wants them.

    Attributes:
        weights: Canonical names, folded; integers where planned.
        floats: What they stand for: folded, repaired, behind AWQ's scales. Empty for a quantized checkpoint.
        score: What the integers do to the answers; None where no solver ran the model.
    """

    weights: MixedSource
    floats: WeightSource
    score: AnswerScore | None


def resolve(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Recipe, int, ImageMode]:
    """The recipe with values where it says `checkpoint`; image size and mode."""
    size, mode = recipe.common.image_size, recipe.common.image_mode
    size = checkpoint.config.vision.image_size if size == "checkpoint" else size
    mode = checkpoint.image_mode if mode == "checkpoint" else mode
    return replace(recipe, common=replace(recipe.common, image_size=size, image_mode=mode)), size, mode


def plan_checkpoint(checkpoint: Checkpoint, recipe: Recipe) -> tuple[LayerPlan, ...]:
    """What a recipe does to every layer of a checkpoint, or did where it is quantized; reads no weight.

    Raises:
        RecipeError: The rules do not fit the model, or are others than a quantized checkpoint's.
    """
    if checkpoint.quantized is not None:
        check_recipe(checkpoint.quantized.record, recipe, checkpoint.path)
        return checkpoint.quantized.record.plans
    return plan_layers({name: weight.shape for name, weight in checkpoint.folded.items()}, recipe)


def calibration_for(checkpoint: Checkpoint, recipe: Recipe, source: Path | None) -> Calibration | None:
    """The data that a recipe calibrates with, or None where it needs none.

    Args:
        checkpoint: A quantized one needs no data any more.
        recipe: Its rules.
        source: A folder or a .jsonl file; None takes the demo generator's pictures.

    Raises:
        ImageError: The source is missing, empty or damaged.
        RecipeError: There is a source, but nothing to calibrate.
    """
    if checkpoint.quantized is None and recipe.is_calibrated:
        return read_calibration(source, recipe.calibration)
    if source is not None:
        why = f"no solver of recipe '{recipe.name}' needs data"
        if checkpoint.quantized is not None:
            why = "the checkpoint is quantized already"
        raise RecipeError(f"there is nothing to calibrate: {why}", hint="leave --calibration out")
    return None


def remembered_calibration(recipe: Recipe, sha256: str | None) -> Calibration | None:
    """The data of a hash: the demo generator's if it is theirs, else the hash alone, enough for the cache."""
    if sha256 is None:
        return None
    default = read_calibration(None, recipe.calibration)
    return default if default.sha256 == sha256 else Calibration((), sha256)


def float_weights(checkpoint: Checkpoint, recipe: Recipe) -> WeightSource:
    """The weights that are quantized: folded, and repaired where the recipe says so."""
    return fp16_safe(fold(checkpoint.weights), checkpoint.config.decoder, recipe.repairs)


def prepare_weights(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration | None = None,
    on_progress: OnProgress = lambda stage, share: None,
) -> PreparedWeights:
    """Fold, repair and quantize. A quantized checkpoint has all that done.

    Args:
        checkpoint: The checkpoint.
        recipe: Its `quantize`, `calibration` and `repairs` sections, and its image size.
        calibration: Data for the solvers that need it; None where none does.
        on_progress: Called with the name of the stage and the share of it that is done, 0..1.

    Raises:
        RecipeError: The rules do not fit the model, or are others than a quantized checkpoint's; or solvers
            need data, and there is none.
        MissingDependencyError: Solvers need data, and torch is not installed.
    """
    plans = plan_checkpoint(checkpoint, recipe)
    if checkpoint.quantized is not None:
        return PreparedWeights(checkpoint.quantized.weights, {}, None)
    floats = float_weights(checkpoint, recipe)
    searched = quantize_weights(floats, plans)
    if not recipe.is_calibrated:
        return PreparedWeights(searched, floats, None)
    try:
        from fastvlm_convert.quantization.calibrate import solved_layers
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "calibration") from error

    if calibration is None:
        raise RecipeError(f"recipe '{recipe.name}' needs data to calibrate with, and none is recorded")
    recipe, size, mode = resolve(checkpoint, recipe)
    config = at_image_size(checkpoint.config, size)
    solved = solved_layers(
        checkpoint, config, mode, recipe, plans, floats, searched, calibration, on_progress
    )
    weights = {**searched, **solved.weights}
    return PreparedWeights(weights, behind_scales(floats, weights), solved.score)
