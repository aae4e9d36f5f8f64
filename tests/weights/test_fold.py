import copy

import numpy as np
import pytest
import torch

from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.io_names import VISION_NORM_EPS
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.source import Weight
from tests.checkpoints import SETS, golden_checkpoint, golden_model

GONE = (".ffn.bn.", ".ffn_scale", ".attention_scale")


def tensor(weight: Weight) -> torch.Tensor:
    return torch.from_numpy(weight.array())


@pytest.mark.parametrize("name", SETS)
def test_only_the_folded_weights_change(name):
    before = golden_checkpoint(name).weights
    after = fold(before)
    gone = {n for n in before if any(part in n for part in GONE)}
    convs = {n.replace(".ffn.bn.weight", ".ffn.conv.bias") for n in before if n.endswith(".ffn.bn.weight")}
    assert len(gone) == 5 * 6 + 2  # BatchNorm and scale of six feed-forward nets, scales of two attentions
    assert set(after) == set(before) - gone | convs
    changed = (".ffn.conv.", ".ffn.fc2.", ".attention.proj.")
    for key, weight in after.items():
        if not any(part in key for part in changed):
            assert weight is before[key], key
    assert set(before) & gone == gone  # the source keeps its own


@pytest.mark.parametrize("name", SETS)
def test_every_folded_weight_is_exact(name):
    """Against torch's own layers in float64, weight by weight."""
    before, model = golden_checkpoint(name).weights, golden_model(name)
    after = fold(before)
    checked = 0
    for key in before:
        if key.endswith(".ffn.bn.weight"):
            ffn = key.removesuffix(".bn.weight")
            module = model.get_submodule(ffn)
            norm = copy.deepcopy(module.bn).double()
            x = torch.randn(
                1, module.conv.in_channels, 9, 9, generator=torch.Generator().manual_seed(0)
            ).double()
            weight, bias = tensor(after[f"{ffn}.conv.weight"]), tensor(after[f"{ffn}.conv.bias"])
            convolve = torch.nn.functional.conv2d
            expected = norm(convolve(x, module.conv.weight.double(), padding=3, groups=len(weight)))
            found = convolve(x, weight.double(), bias.double(), padding=3, groups=len(weight))
            assert (expected - found).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
        elif key.endswith("_scale"):
            layer = key.removesuffix("_scale") + (".fc2" if "ffn" in key else ".proj")
            scale = tensor(before[key])
            for part in ("weight", "bias"):
                plain, folded = tensor(before[f"{layer}.{part}"]), tensor(after[f"{layer}.{part}"])
                expected = plain.double() * scale.double().reshape(-1, *[1] * (plain.dim() - 1))
                torch.testing.assert_close(folded.double(), expected, rtol=1e-6, atol=1e-7)
        else:
            continue
        checked += 1
    assert checked == 6 + 6 + 2


def test_folded_weights_are_read_by_rows():
    after = fold(golden_checkpoint(SETS[0]).weights)
    for key in (
        "vision.stages.2.blocks.1.ffn.conv.weight",
        "vision.stages.2.blocks.1.ffn.conv.bias",
        "vision.stages.3.blocks.0.attention.proj.weight",
        "vision.stages.3.blocks.0.ffn.fc2.weight",
    ):
        whole = after[key].array()
        assert whole.dtype == np.float32
        assert whole.shape == after[key].shape
        np.testing.assert_array_equal(after[key].read(5, 11), whole[5:11])


def memory(values):
    array = np.asarray(values, np.float32)
    return Weight(array.shape, "float32", lambda start, stop: array[start:stop].copy())


def small_ffn(var):
    return {
        "x.ffn.conv.weight": memory(np.ones((2, 1, 1, 1))),
        "x.ffn.bn.weight": memory([2.0, 3.0]),
        "x.ffn.bn.bias": memory([0.5, -1.0]),
        "x.ffn.bn.running_mean": memory([1.0, -2.0]),
        "x.ffn.bn.running_var": memory(var),
    }


def test_the_arithmetic_of_batch_norm():
    folded = fold(small_ffn([4.0, 0.25]))
    scale = np.array([2, 3]) / np.sqrt(np.array([4, 0.25]) + VISION_NORM_EPS)
    np.testing.assert_allclose(folded["x.ffn.conv.weight"].array().ravel(), scale, rtol=1e-7)
    np.testing.assert_allclose(
        folded["x.ffn.conv.bias"].array(), [0.5, -1] - np.array([1, -2]) * scale, rtol=1e-6
    )
    assert set(folded) == {"x.ffn.conv.weight", "x.ffn.conv.bias"}


def test_a_negative_variance_is_refused():
    with pytest.raises(CheckpointError, match=r"'x\.ffn\.bn\.running_var' is negative"):
        fold(small_ffn([4.0, -0.25]))["x.ffn.conv.weight"].array()
