"""A recipe as resolved for a checkpoint: everything that it may leave to the checkpoint has a value."""

from dataclasses import dataclass, field

from fastvlm_convert.preprocess import ImageMode
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.recipe_settings import CommonSettings


@dataclass(frozen=True)
class ResolvedCommon(CommonSettings):
    """What every target shares.

    Attributes:
        image_size: Edge of the square input in pixels.
        image_mode: How images are made square.
    """

    image_size: int = field()  # `field()`: without the default of the class above
    image_mode: ImageMode = field()


@dataclass(frozen=True)
class ResolvedRecipe(Recipe):
    """How a certain checkpoint is converted; what bundles and quantized checkpoints record.

    Attributes:
        common: What every target shares.
    """

    common: ResolvedCommon = field()


def resolve(recipe: Recipe, image_size: int, image_mode: ImageMode) -> ResolvedRecipe:
    """A recipe with a checkpoint's own values where it says `checkpoint`.

    Args:
        recipe: The recipe as written.
        image_size: What the checkpoint was trained at, in pixels.
        image_mode: How the checkpoint's config makes images square.
    """
    size, mode = recipe.common.image_size, recipe.common.image_mode
    common = ResolvedCommon(
        image_size=image_size if size == "checkpoint" else size,
        image_mode=image_mode if mode == "checkpoint" else mode,
        max_context_length=recipe.common.max_context_length,
        system_prompt=recipe.common.system_prompt,
    )
    return ResolvedRecipe(**{**vars(recipe), "common": common})
