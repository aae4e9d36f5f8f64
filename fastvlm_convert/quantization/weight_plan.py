"""What a recipe makes of a checkpoint's weights: decided once, from config and headers alone."""

from dataclasses import dataclass, replace

from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.checkpoint.quantized_checkpoint import check_recipe
from fastvlm_convert.preprocess import ImageSettings
from fastvlm_convert.prompt import PromptFormat, with_system_prompt
from fastvlm_convert.quantized.layer_plan import LayerPlan, plan_layers
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.resolved_recipe import ResolvedRecipe, resolve
from fastvlm_convert.weights.model_config import ModelConfig, at_image_size
from fastvlm_convert.weights.rescale import repaired_config


@dataclass(frozen=True)
class WeightPlan:
    """A checkpoint, and what happens to its weights; none has been read.

    Attributes:
        checkpoint: The checkpoint, adapter merged in.
        recipe: The recipe, with every setting resolved.
        config: Dimensions at the recipe's image size, as its repairs leave them.
        layers: What happens to every layer, or did where the checkpoint is quantized.
    """

    checkpoint: Checkpoint
    recipe: ResolvedRecipe
    config: ModelConfig
    layers: tuple[LayerPlan, ...]

    @property
    def images(self) -> ImageSettings:
        """How pictures are prepared."""
        common = self.recipe.common
        return replace(self.checkpoint.pictures.image, size=common.image_size, mode=common.image_mode)

    @property
    def prompt(self) -> PromptFormat:
        """How conversations are written.

        Raises:
            PromptError: The recipe has a system prompt, and the model's chat template no system turn.
        """
        text = self.recipe.common.system_prompt
        form = self.checkpoint.prompt.format
        return form if text == "checkpoint" else with_system_prompt(form, text)

    @property
    def is_calibrated(self) -> bool:
        """Whether layers are still to be solved with data."""
        return self.recipe.is_calibrated and self.checkpoint.quantized is None


def plan_weights(checkpoint: Checkpoint, recipe: Recipe) -> WeightPlan:
    """Resolve a recipe for a checkpoint and decide what it does to every layer.

    Raises:
        RecipeError: The recipe does not fit the model, or its rules are others than a quantized
            checkpoint's.
    """
    resolved = resolve(recipe, checkpoint.config.vision.image_size, checkpoint.image_mode)
    config = repaired_config(at_image_size(checkpoint.config, resolved.common.image_size), resolved.repairs)
    return WeightPlan(checkpoint, resolved, config, _planned_layers(checkpoint, resolved))


def _planned_layers(checkpoint: Checkpoint, recipe: Recipe) -> tuple[LayerPlan, ...]:
    if checkpoint.quantized is not None:
        check_recipe(checkpoint.quantized.record, recipe, checkpoint.path)
        return checkpoint.quantized.record.plans
    return plan_layers({name: weight.shape for name, weight in checkpoint.folded.items()}, recipe)
