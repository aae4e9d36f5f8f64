"""What a target cannot execute, known from dimensions and settings: no weight is read, no library loaded."""

from collections.abc import Callable, Sequence
from typing import Final

from fastvlm_convert.errors import TargetError
from fastvlm_convert.manifest import Target
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.config import ModelConfig
from fastvlm_convert.weights.plan import LayerPlan
from fastvlm_convert.weights.schemes import AffineScheme, PaletteScheme

_HEAD_DIM_STEP = 16  # GroupQueryAttention with rotary positions inside
_APPLE_IMAGE_SIZE, _APPLE_WIDTH = 1024, 3072  # Apple's app aborts on any other shape


def check_target(target: Target, config: ModelConfig, recipe: Recipe, plans: Sequence[LayerPlan]) -> None:
    """Refuse dimensions, settings and schemes that a target cannot take.

    Raises:
        TargetError: Names what it cannot take and what is allowed.
    """
    _CHECKS[target](config, recipe, plans)


def _check_onnx(config: ModelConfig, recipe: Recipe, plans: Sequence[LayerPlan]) -> None:
    if config.decoder.head_dim % _HEAD_DIM_STEP:
        raise TargetError(
            f"the decoder's head size is {config.decoder.head_dim}; ONNX Runtime's GroupQueryAttention "
            f"with rotary positions needs a multiple of {_HEAD_DIM_STEP}",
            hint="this model cannot be run by ONNX Runtime; `run` answers from the checkpoint itself",
        )
    for plan in plans:
        if isinstance(plan.scheme, PaletteScheme):
            raise TargetError(
                f"layer '{plan.layer}' is a palette, but ONNX Runtime has no operator that reads one",
                hint="give its rule the scheme int4 or int8, or export to coreml alone",
            )
        if (
            plan.layer.startswith("decoder.")
            and isinstance(plan.scheme, AffineScheme)
            and plan.scheme.block_size is None
        ):
            raise TargetError(
                f"layer '{plan.layer}' is quantized per channel, but ONNX Runtime's MatMulNBits needs blocks",
                hint="give its rule a block_size of 16, 32, 64 or 128",
            )
    for component in ("vision", "decoder"):
        if getattr(recipe, component).float32_ops:
            raise TargetError(
                f"{component}.float32_ops is set, which only Core ML packages can follow",
                hint=f"set {component}.compute to float32 for ONNX",
            )


def _check_coreml(config: ModelConfig, recipe: Recipe, plans: Sequence[LayerPlan]) -> None:
    del plans  # every scheme can be expressed
    vision = config.vision
    fits_app = (vision.image_size, vision.output_width) == (_APPLE_IMAGE_SIZE, _APPLE_WIDTH)
    if recipe.coreml.drop_in and not fits_app:
        raise TargetError(
            f"Apple's app takes {_APPLE_IMAGE_SIZE} pixels and features of {_APPLE_WIDTH}; this model has "
            f"{vision.image_size} pixels and features of {vision.output_width}",
            hint="set coreml.drop_in to false, or image_size to 1024 for a model of full width",
        )


_CHECKS: Final[dict[Target, Callable[[ModelConfig, Recipe, Sequence[LayerPlan]], None]]] = {
    "onnx": _check_onnx,
    "coreml": _check_coreml,
}
