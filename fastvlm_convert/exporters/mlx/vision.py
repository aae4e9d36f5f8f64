"""The image encoder and the projector under the names of mlx-vlm, which are Apple's own."""

from collections.abc import Iterator
from typing import Final

from fastvlm_convert.exporters.mlx.weights import NamedWeight, channels_last, constant
from fastvlm_convert.io_names import VISION_NORM_EPS
from fastvlm_convert.quantized.weight import AffineSource, float_weight
from fastvlm_convert.recipe_settings import FloatSettings
from fastvlm_convert.weights.model_config import StageConfig, VisionConfig
from fastvlm_convert.weights.source import Weight

# Columns of the classifier, which mlx-vlm demands, computes and throws away.
PROJECTION_DIM: Final = 1
LIBRARY_PROJECTOR: Final = {"projector.fc1": "mm_projector.0", "projector.fc2": "mm_projector.2"}
APP_PROJECTOR: Final = {
    "projector.fc1": "multi_modal_projector.linear_0",
    "projector.fc2": "multi_modal_projector.linear_2",
}

_ROOT: Final = "vision_tower.vision_model"


def build_vision(
    config: VisionConfig, weights: AffineSource, settings: FloatSettings
) -> Iterator[NamedWeight]:
    """The encoder's weights, in the order of the network.

    BatchNorm and LayerScale are folded into their neighbors; in their places stand ones that do nothing.

    Args:
        config: Dimensions.
        weights: Canonical names, folded.
        settings: Precision.
    """
    storage, compute = settings.storage, settings.compute
    for name, weight in _encoder(config, weights):
        # mlx-vlm hands pixels over in the dtype of the first convolution.
        is_first = name == f"{_ROOT}.patch_embed.blocks.0.reparam_conv.weight"
        yield NamedWeight(name, weight, compute if is_first else storage, compute)


def build_projector(
    names: dict[str, str], weights: AffineSource, settings: FloatSettings
) -> Iterator[NamedWeight]:
    """The projector's weights; `names` are those of its layers, by ours."""
    for layer, module in names.items():
        for part in ("weight", "bias"):
            yield NamedWeight(
                f"{module}.{part}", weights[f"{layer}.{part}"], settings.storage, settings.compute
            )


Found = Iterator[tuple[str, Weight]]


def _encoder(vision: VisionConfig, weights: AffineSource) -> Found:
    for i in range(3):
        yield from _conv(f"patch_embed.blocks.{i}.reparam_conv", f"vision.stem.{i}", weights)
    place = 0  # blocks, position encodings and downsamplings are numbered in one list
    for s, stage in enumerate(vision.stages):
        ours = f"vision.stages.{s}"
        if s:
            down = f"network.{place}.proj"
            yield from _conv(f"{down}.0.lkb_reparam", f"{ours}.downsample.0", weights)
            yield from _conv(f"{down}.1.reparam_conv", f"{ours}.downsample.1", weights)
            place += 1
        if stage.has_position:
            yield from _conv(f"network.{place}.reparam_conv", f"{ours}.position", weights)
            place += 1
        for b in range(stage.depth):
            yield from _block(f"network.{place}.{b}", f"{ours}.blocks.{b}", stage, weights)
        place += 1
    yield from _conv("conv_exp.reparam_conv", "vision.final.conv", weights)
    yield from _conv("conv_exp.se.reduce", "vision.final.se.reduce", weights)
    yield from _conv("conv_exp.se.expand", "vision.final.se.expand", weights)
    yield f"{_ROOT}.head.proj", constant((vision.output_width, PROJECTION_DIM), 0)


def _block(theirs: str, ours: str, stage: StageConfig, weights: AffineSource) -> Found:
    root, width = f"{_ROOT}.{theirs}", stage.width
    if stage.mixer == "conv":
        yield from _conv(f"{theirs}.token_mixer.reparam_conv", f"{ours}.mixer", weights)
        yield f"{root}.layer_scale", constant((1, 1, width), 1)
    else:
        for part in ("norm.weight", "norm.bias"):
            yield f"{root}.{part}", float_weight(weights, f"{ours}.{part}")
        for part in ("qkv.weight", "proj.weight", "proj.bias"):
            yield f"{root}.token_mixer.{part}", float_weight(weights, f"{ours}.attention.{part}")
        for scale in ("layer_scale_1", "layer_scale_2"):
            yield f"{root}.{scale}", constant((1, 1, width), 1)
    conv = float_weight(weights, f"{ours}.ffn.conv.weight")
    yield f"{root}.convffn.conv.conv.weight", channels_last(conv)
    norm = f"{root}.convffn.conv.bn"
    yield f"{norm}.weight", constant((width,), 1)
    yield f"{norm}.bias", float_weight(weights, f"{ours}.ffn.conv.bias")
    yield f"{norm}.running_mean", constant((width,), 0)
    yield f"{norm}.running_var", constant((width,), 1 - VISION_NORM_EPS)
    for layer in ("fc1", "fc2"):
        yield from _conv(f"{theirs}.convffn.{layer}", f"{ours}.ffn.{layer}", weights)


def _conv(theirs: str, ours: str, weights: AffineSource) -> Found:
    yield f"{_ROOT}.{theirs}.weight", channels_last(float_weight(weights, f"{ours}.weight"))
    yield f"{_ROOT}.{theirs}.bias", float_weight(weights, f"{ours}.bias")
