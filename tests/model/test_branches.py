"""Checkpoints saved before re-parameterisation give the features of the modules they were saved from."""

import re

import pytest
import torch
from torch import nn

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.checkpoint.layouts import canonical_names
from fastvlm_convert.model.fastvlm import load_model
from fastvlm_convert.weights.fold import fold
from tests.checkpoints import (
    APPLE_VISION,
    HF,
    LLAVA,
    TIMM_VISION,
    copy_checkpoint,
    open_model,
    read_tensors,
    tree_state,
    write_tensors,
)
from tests.model.branches import (
    APPLE,
    TIMM,
    LargeKernel,
    MobileOne,
    Position,
    RepMixer,
    randomize,
    stored_names,
)

LAYOUTS = {"apple": (LLAVA, APPLE, APPLE_VISION), "timm": (HF, TIMM, TIMM_VISION)}
MERGED = re.compile(r"(.+)\.(?:reparam_conv|lkb_reparam)\.weight$")


def train_time(place: str, conv: nn.Conv2d) -> nn.Module:
    """The module that was trained where `conv` runs now; variants alternate."""
    if place.endswith("mixer"):
        return RepMixer(conv, scaled="stages.1" not in place)
    if place.endswith("position"):
        return Position(conv)
    if place.endswith("downsample.0"):
        return LargeKernel(conv, small=None if "stages.2" in place else 3)
    # FastViTHD trains its stem without pointwise branches.
    return MobileOne(
        conv, num_branches=2 if place.endswith("final.conv") else 1, pointwise="stem" not in place
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_encoder_of_branches(layout, tmp_path):
    name, names, vision = LAYOUTS[layout]
    folder = copy_checkpoint(name, tmp_path)
    model, tensors = open_model(folder), read_tensors(folder)
    kinds = set()
    for seed, stored in enumerate(sorted(n for n in tensors if n.startswith(vision))):
        match = MERGED.match(stored)
        if match is None:
            continue
        place = canonical_names([stored, *tensors], model_type(name))[stored].removesuffix(".weight")
        module = randomize(train_time(place, model.get_submodule(place)), seed)
        kinds.add(type(module))
        parent, _, child = place.rpartition(".")
        model.get_submodule(parent).register_module(child, module)
        del tensors[stored], tensors[stored.replace(".weight", ".bias")]
        tensors |= stored_names(module, match[1], names)
    assert kinds == {MobileOne, RepMixer, LargeKernel, Position}
    assert not any("reparam" in stored for stored in tensors)
    write_tensors(folder, tensors)
    before = tree_state(folder)

    checkpoint = open_checkpoint(folder)
    pixels = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.vision(pixels)
        for folded in (False, True):
            weights = fold(checkpoint.weights) if folded else checkpoint.weights
            found = load_model(checkpoint.config, weights, folded).vision(pixels)
            assert (expected - found).abs().max() <= 1e-5 * max(1.0, expected.abs().max())
    assert tree_state(folder) == before
    leftovers = {n for n in checkpoint.unused if not n.endswith("num_batches_tracked")}
    assert leftovers <= {f"{APPLE_VISION}head.proj"}


def model_type(name: str) -> str:
    return "llava_qwen2" if name == LLAVA else "fast_vlm"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_branches_and_merged_blocks_can_be_mixed(layout, tmp_path):
    name, names, vision = LAYOUTS[layout]
    folder = copy_checkpoint(name, tmp_path)
    prefix = f"{vision}{'patch_embed' if layout == 'apple' else 'stem'}.1"
    plain, tensors = open_model(folder), read_tensors(folder)
    module = randomize(MobileOne(plain.vision.stem[1], 3), seed=4)
    tensors = {k: v for k, v in tensors.items() if not k.startswith(f"{prefix}.")}
    write_tensors(folder, tensors | stored_names(module, prefix, names))
    merged = open_model(folder).vision.stem[1]
    x = torch.randn(1, 8, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(merged(x), module(x), rtol=0, atol=1e-5)
