"""What mlx-vlm and Apple's app cannot load, known from dimensions and settings; loads no library."""

from collections.abc import Iterator, Sequence
from typing import Final

from fastvlm_convert.errors import TargetError
from fastvlm_convert.exporters.mlx.groups import (
    QuantizedLayer,
    group_size,
    planned_layers,
    shared_group_size,
)
from fastvlm_convert.io_names import FloatName
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.schemes import AffineScheme, PaletteScheme
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.parts import is_language, part_of
from fastvlm_convert.weights.published import DEPTHS, WIDTHS

AUTO_COMPUTE: Final[FloatName] = "float16"  # as MLX models are shipped
_SIZES: Final = "32, 64 or 128"


def check(config: ModelConfig, recipe: Recipe, layers: Sequence[LayerPlan]) -> None:
    """Refuse dimensions, settings and schemes that the loaders of MLX weights cannot take.

    Raises:
        TargetError: Names what they cannot take and what is allowed.
    """
    _check_dimensions(config)
    if recipe.vision.activations != "float":
        raise TargetError(
            f"vision.activations is {recipe.vision.activations}, but MLX files hold weights alone: the "
            "network is the client's",
            hint="set vision.activations to float for MLX, or export to onnx alone",
        )
    for component in ("vision", "decoder"):
        if getattr(recipe, component).float32_ops:
            raise TargetError(
                f"{component}.float32_ops is set, which only Core ML packages can follow",
                hint=f"set {component}.compute to float32 for MLX",
            )
    for name in ("residual_shift", "float32_scores", "separate_key_bias"):
        if getattr(recipe.repairs, name):
            raise TargetError(
                f"repairs.{name} is set, but MLX files hold weights alone: the network is the client's",
                hint=f"leave repairs.{name} out and set decoder.compute to float32 for MLX",
            )
    for plan in layers:
        if isinstance(plan.scheme, PaletteScheme):
            raise TargetError(
                f"layer '{plan.layer}' has scheme palette{plan.scheme.bits}, but MLX has no tables",
                hint=f"MLX has int8 and int4 with a block_size of {_SIZES}; palettes are for coreml",
            )
    if recipe.coreml.drop_in:
        _check_uniform(planned_layers(layers))


def notes(config: ModelConfig, recipe: Recipe, layers: Sequence[QuantizedLayer]) -> Iterator[str]:
    """What MLX files hold otherwise than a plan of layers says, and what their loaders do on their own."""
    if in_encoder := [layer for layer in layers if part_of(layer.layer) == "vision"]:
        yield (
            f"mlx: MLX's convolutions take no integers, so {len(in_encoder)} layers of the encoder are "
            f"{recipe.vision.storage}: the values of their integers"
        )
    others = [layer for layer in layers if part_of(layer.layer) != "vision"]
    if odd := [layer for layer in others if group_size(layer) is None]:
        yield (
            f"mlx: MLX has groups of {_SIZES}, so {len(odd)} layers ({odd[0].layer} for example) are "
            "floats: the values of their integers"
        )
    shifted = [layer for layer in others if group_size(layer) is not None and _is_rounded(layer, recipe)]
    if shifted:
        yield (
            f"mlx: {len(shifted)} layers have zero points, which MLX stores as float16 products with the "
            "scales, rounded to 11 bits; integers and scales are those of other targets"
        )
    stages = [(stage.width, stage.depth) for stage in config.vision.stages]
    if stages != list(zip(WIDTHS, DEPTHS, strict=True)):
        yield (
            "mlx: mlx-vlm builds the published encoder whatever a config says; set its VisionConfig.layers "
            "and embed_dims before loading this one (docs/mlx.md)"
        )
    if recipe.common.image_mode == "crop":
        yield "mlx: mlx-vlm pads pictures to squares, the recipe crops them"


def _is_rounded(layer: QuantizedLayer, recipe: Recipe) -> bool:
    """Whether float16 holds the products of a layer's scales and zero points."""
    settings = recipe.decoder.on(AUTO_COMPUTE) if is_language(layer.layer) else recipe.vision
    scheme = layer.scheme
    return isinstance(scheme, AffineScheme) and not scheme.symmetric and settings.compute == "float16"


def _check_dimensions(config: ModelConfig) -> None:
    decoder = config.decoder
    if decoder.head_dim * decoder.num_heads != decoder.hidden_size:
        raise TargetError(
            f"the decoder has {decoder.num_heads} heads of {decoder.head_dim}, but MLX's Qwen2 divides its "
            f"width of {decoder.hidden_size} among them",
            hint="this model cannot be loaded by mlx-vlm; `run` answers from the checkpoint itself",
        )
    if decoder.embed_rows != decoder.vocab_size:
        raise TargetError(
            f"the embedding has {decoder.embed_rows} rows and the head {decoder.vocab_size}; MLX's Qwen2 "
            "has one vocab_size for both",
            hint="resize both to one vocabulary and save the checkpoint again",
        )
    if config.projector_width != decoder.hidden_size:
        raise TargetError(
            f"the projector is {config.projector_width} wide inside, but mlx-vlm and Apple's app make it as "
            f"wide as the decoder, {decoder.hidden_size}",
            hint="this model cannot be loaded by them; `run` answers from the checkpoint itself",
        )


def _check_uniform(layers: Sequence[QuantizedLayer]) -> None:
    """Apple's app has one `quantization` for its whole folder.

    Raises:
        TargetError: The layers that it loads differ.
    """
    held = [layer for layer in layers if group_size(layer) is not None]
    if not held:
        return
    allowed = (
        f"one number of bits and one block_size of {_SIZES} for decoder, table, head and projector; whole "
        "rows of the same bits and floats fit in as well; or set coreml.drop_in to false"
    )
    first = held[0]
    for layer in held:
        if layer.scheme.bits != first.scheme.bits:
            raise TargetError(
                f"Apple's app takes integers of one width, but '{first.layer}' has {first.scheme.bits} bits "
                f"and '{layer.layer}' {layer.scheme.bits}",
                hint=allowed,
            )
    if shared_group_size(held) is None:
        sizes = sorted({size for layer in held if (size := group_size(layer)) is not None})
        raise TargetError(
            f"Apple's app takes groups of one size, but the layers have {' and '.join(map(str, sizes))}",
            hint=allowed,
        )
