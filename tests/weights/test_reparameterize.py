"""Single blocks against torch, and incomplete ones. Whole encoders are in `model/test_branches.py`."""

import pytest
import torch
from torch import nn

from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.weights.reparameterize import reparameterize
from fastvlm_convert.weights.source import Weight
from tests.model.branches import LargeKernel, MobileOne, Position, RepMixer, randomize, stored_names

BLOCK = "vision.block"
OURS = {"position": "position_conv"}  # otherwise the modules in `branches` have our names


def depthwise(width, kernel, stride=1):
    return nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width)


def as_weights(state):
    def weight(tensor):
        array = tensor.numpy()
        return Weight(array.shape, "float32", lambda start, stop: array[start:stop])

    return {n: weight(t) for n, t in state.items() if not n.endswith("num_batches_tracked")}


def state_of(module):
    return stored_names(module, BLOCK, OURS)


def merge(state):
    return reparameterize(as_weights(state), [BLOCK])


MODULES = {
    "all branches": (lambda c: MobileOne(c, 1), depthwise(6, 3)),
    "several convolutions": (lambda c: MobileOne(c, 4), depthwise(6, 3)),
    "more than ten convolutions": (lambda c: MobileOne(c, 11), depthwise(2, 3)),
    "no pointwise": (lambda c: MobileOne(c, 1, pointwise=False), depthwise(6, 3)),
    "stride two": (lambda c: MobileOne(c, 2), depthwise(6, 3, stride=2)),
    "dense": (lambda c: MobileOne(c, 1), nn.Conv2d(5, 5, 3, padding=1)),
    "dense and wider": (lambda c: MobileOne(c, 1), nn.Conv2d(3, 7, 3, 2, 1)),
    "grouped": (lambda c: MobileOne(c, 1), nn.Conv2d(6, 6, 3, padding=1, groups=2)),
    "pointwise alone": (lambda c: MobileOne(c, 2), nn.Conv2d(5, 5, 1)),
    "depthwise and wider": (lambda c: MobileOne(c, 1), nn.Conv2d(4, 8, 3, padding=1, groups=4)),
    "mixer": (RepMixer, depthwise(6, 3)),
    "mixer without scale": (lambda c: RepMixer(c, scaled=False), depthwise(6, 3)),
    "large kernel": (lambda c: LargeKernel(c, 3), depthwise(6, 7, stride=2)),
    "large kernel with five": (lambda c: LargeKernel(c, 5), depthwise(6, 7, stride=2)),
    "large kernel alone": (lambda c: LargeKernel(c, None), depthwise(6, 7, stride=2)),
    "position": (Position, depthwise(6, 7)),
}


@pytest.mark.parametrize("case", MODULES)
def test_one_convolution_does_what_the_branches_do(case):
    build, conv = MODULES[case]
    module = randomize(build(conv), seed=3)
    weights = merge(state_of(module))
    assert set(weights) == {f"{BLOCK}.weight", f"{BLOCK}.bias"}
    x = torch.randn(2, conv.in_channels, 11, 13, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        conv.weight.copy_(torch.from_numpy(weights[f"{BLOCK}.weight"].array()))
        conv.bias.copy_(torch.from_numpy(weights[f"{BLOCK}.bias"].array()))
        expected = module(x)
        assert expected.std() > 0.1
        torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-5)


def test_other_weights_and_merged_blocks_pass_through():
    weights = as_weights(
        {"other.weight": torch.ones(2), f"{BLOCK}.weight": torch.ones(1), f"{BLOCK}.bias": torch.ones(1)}
    )
    assert reparameterize(weights, [BLOCK, "vision.absent"]) == weights


def test_the_stored_dtype_is_kept_and_does_not_depend_on_order():
    state = as_weights(state_of(randomize(MobileOne(depthwise(4, 3), 1), 0)))
    first = min(state)
    state[first] = Weight(state[first].shape, "float16", state[first].read)
    for names in (sorted(state), sorted(state, reverse=True)):
        merged = reparameterize({n: state[n] for n in names}, [BLOCK])
        assert merged[f"{BLOCK}.weight"].dtype == "float16"


@pytest.mark.parametrize("case", MODULES)
def test_a_block_that_lacks_any_tensor_is_refused(case):
    build, conv = MODULES[case]
    module = build(conv)
    state = {n: t for n, t in state_of(randomize(module, seed=3)).items() if "num_batches" not in n}
    optional = f"{BLOCK}.layer_scale"  # RepMixer exists without
    for name in set(state) - {optional}:
        with pytest.raises(CheckpointError, match=f"{BLOCK}.*(missing|no convolution)"):
            merge({n: t for n, t in state.items() if n != name})


def test_a_mixer_without_norm_is_refused():
    state = state_of(randomize(RepMixer(depthwise(4, 3)), 0))
    with pytest.raises(CheckpointError, match=r"branches of 'vision\.block\.norm' are missing"):
        merge({n: t for n, t in state.items() if ".norm." not in n})


@pytest.mark.parametrize("extra", ["branches.0.conv.bias", "surprise", "mixer.branches.0.se.weight"])
def test_a_tensor_that_fits_nowhere_is_refused(extra):
    module = RepMixer(depthwise(4, 3)) if extra.startswith("mixer") else MobileOne(depthwise(4, 3), 1)
    state = state_of(randomize(module, 0)) | {f"{BLOCK}.{extra}": torch.ones(4)}
    with pytest.raises(CheckpointError, match=f"'{BLOCK}.{extra}' belongs to no branch of '{BLOCK}'"):
        merge(state)


def test_a_block_that_is_both_merged_and_branched_is_refused():
    state = state_of(randomize(MobileOne(depthwise(4, 3), 1), 0))
    state |= {f"{BLOCK}.weight": torch.ones(4, 1, 3, 3), f"{BLOCK}.bias": torch.ones(4)}
    with pytest.raises(CheckpointError, match="both a merged convolution and train-time branches"):
        merge(state)


WRONG_SHAPES = {
    "branches.0.bn.weight": torch.ones(3),
    "branches.0.conv.weight": torch.ones(4, 9),
    "branches.1.conv.weight": torch.ones(4, 1, 5, 5),
    "pointwise.conv.weight": torch.ones(4, 1),
    "identity.weight": torch.ones(5),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_shapes_that_do_not_go_together_are_refused(name):
    state = state_of(randomize(MobileOne(depthwise(4, 3), 2), 0))
    with pytest.raises(CheckpointError, match=f"train-time branches of '{BLOCK}' do not fit together"):
        merge(state | {f"{BLOCK}.{name}": WRONG_SHAPES[name]})


def test_a_negative_variance_is_refused():
    state = state_of(randomize(MobileOne(depthwise(4, 3), 1), 0))
    with pytest.raises(CheckpointError, match=r"identity\.running_var' is negative"):
        merge(state | {f"{BLOCK}.identity.running_var": -torch.ones(4)})
