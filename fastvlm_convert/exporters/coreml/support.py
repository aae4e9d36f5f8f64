"""What the clients of a Core ML bundle cannot take, known from dimensions and settings; loads no library."""

from collections.abc import Sequence
from typing import Final

from fastvlm_convert.errors import TargetError
from fastvlm_convert.io_names import FloatName
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import ModelConfig

AUTO_COMPUTE: Final[FloatName] = "float16"  # all that the Neural Engine has
_APPLE_IMAGE_SIZE, _APPLE_WIDTH = 1024, 3072  # Apple's app aborts on any other shape


def check(config: ModelConfig, recipe: Recipe, layers: Sequence[LayerPlan]) -> None:
    """Refuse 16-bit activations, and dimensions that Apple's app cannot take; Core ML itself takes any.

    Raises:
        TargetError: Names what cannot be taken and what is allowed.
    """
    del layers  # every scheme can be expressed
    if recipe.vision.activations == "int16":
        raise TargetError(
            "vision.activations is int16, but Core ML quantizes activations to 8 bits alone",
            hint="set vision.activations to int8 or float for Core ML, or export to onnx alone",
        )
    vision = config.vision
    fits_app = (vision.image_size, vision.output_width) == (_APPLE_IMAGE_SIZE, _APPLE_WIDTH)
    if recipe.coreml.drop_in and not fits_app:
        raise TargetError(
            f"Apple's app takes {_APPLE_IMAGE_SIZE} pixels and features of {_APPLE_WIDTH}; this model has "
            f"{vision.image_size} pixels and features of {vision.output_width}",
            hint="set coreml.drop_in to false, or image_size to 1024 for a model of full width",
        )
