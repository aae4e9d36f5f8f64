"""What ONNX Runtime cannot execute, known from dimensions and settings; loads no library."""

from collections.abc import Sequence
from typing import Final

from fastvlm_convert.errors import TargetError
from fastvlm_convert.exporters.onnx.pictures import RESIZED_IN_GRAPH
from fastvlm_convert.io_names import FloatName
from fastvlm_convert.preprocess import ImageSettings
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.schemes import PaletteScheme
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.recipe_settings import OnnxSettings
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.parts import EMBEDDING, is_language

# Where a recipe leaves it open. On x86 ONNX Runtime has no float16 sums and activations, and casts around
# each: five times a layer.
AUTO_COMPUTE: Final[FloatName] = "float32"
_HEAD_DIM_STEP = 16  # GroupQueryAttention with rotary positions inside
_SLOW_BITS = 8  # MatMulNBits has a kernel for them at accuracy level 4 alone


def check(config: ModelConfig, recipe: Recipe, layers: Sequence[LayerPlan]) -> None:
    """Refuse dimensions, settings and schemes that ONNX Runtime cannot take.

    Raises:
        TargetError: Names what it cannot take and what is allowed.
    """
    if config.decoder.head_dim % _HEAD_DIM_STEP:
        raise TargetError(
            f"the decoder's head size is {config.decoder.head_dim}; ONNX Runtime's GroupQueryAttention "
            f"with rotary positions needs a multiple of {_HEAD_DIM_STEP}",
            hint="this model cannot be run by ONNX Runtime; `run` answers from the checkpoint itself",
        )
    for plan in layers:
        _check_scheme(plan, config, recipe.onnx)
    if recipe.vision.activations != "float" and recipe.vision.compute == "float16":
        raise TargetError(
            f"vision.activations is {recipe.vision.activations} and vision.compute float16, but ONNX graphs "
            "compute what lies between layers with integers in float32",
            hint="set vision.compute to float32 for ONNX",
        )
    for component in ("vision", "decoder"):
        if getattr(recipe, component).float32_ops:
            raise TargetError(
                f"{component}.float32_ops is set, which only Core ML packages can follow",
                hint=f"set {component}.compute to float32 for ONNX",
            )
    for name in ("float32_scores", "separate_key_bias"):
        if getattr(recipe.repairs, name):
            raise TargetError(
                f"repairs.{name} is set, which only Core ML packages can follow; in ONNX attention is one "
                "operator",
                hint=f"leave repairs.{name} empty and set decoder.compute to float32 for ONNX",
            )


def check_pictures(recipe: Recipe, images: ImageSettings) -> None:
    """Refuse filters that a graph cannot follow to the bit.

    Raises:
        TargetError: Names the filter and those that it can.
    """
    if recipe.onnx.preprocessing == "in_graph" and images.resampling not in RESIZED_IN_GRAPH:
        raise TargetError(
            f"the checkpoint's pictures are resized with {images.resampling}, and onnx.preprocessing is "
            f"in_graph, which can do {' and '.join(RESIZED_IN_GRAPH)}",
            hint="set onnx.preprocessing to client",
        )


def _check_scheme(plan: LayerPlan, config: ModelConfig, settings: OnnxSettings) -> None:
    """Refuse a scheme that ONNX cannot express, or that ONNX Runtime executes far slower than floats."""
    scheme, layer = plan.scheme, plan.layer
    if isinstance(scheme, PaletteScheme):
        raise TargetError(
            f"layer '{layer}' has scheme palette{scheme.bits}, but ONNX has no look-up of weights",
            hint="ONNX has int8 and int4 with a block_size of 16, 32, 64 or 128; palettes are for coreml",
        )
    if scheme is None or not is_language(layer):
        return
    if scheme.block_size is None:
        raise TargetError(
            f"layer '{layer}' is quantized per channel, but ONNX Runtime's MatMulNBits needs blocks",
            hint="give its rule a block_size of 16, 32, 64 or 128",
        )
    is_looked_up = layer == EMBEDDING and not config.decoder.tied
    if scheme.bits == _SLOW_BITS and settings.accuracy_level == 0 and not is_looked_up:
        raise TargetError(
            f"layer '{layer}' has {scheme.bits} bits, and onnx.accuracy_level is 0: ONNX Runtime then "
            "dequantizes the whole weight for every token, some 250 times slower than at level 4",
            hint="set onnx.accuracy_level to 4, or give the layer 4 bits",
        )
