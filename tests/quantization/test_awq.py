"""Scales of input channels."""

import numpy as np

from fastvlm_convert.quantization.awq import MOST, channel_scales, norm_before, scaled_error
from fastvlm_convert.quantized.schemes import AffineScheme
from tests.quantization.layers import correlated_hessian, correlated_inputs, weights

SCHEME = AffineScheme(4, 128, symmetric=False)


def test_outlying_channels_are_protected() -> None:
    layers, hessian = [weights(0), weights(1)], correlated_hessian(0)
    loud = np.ones(256)
    loud[::37] = 30
    hessian *= np.outer(loud, loud)
    scales = channel_scales(layers, hessian, SCHEME)
    both, ones = np.concatenate(layers), np.ones(256, np.float32)
    assert scaled_error(both, hessian, SCHEME, scales) < 0.7 * scaled_error(both, hessian, SCHEME, ones)
    assert scales[::37].min() > np.median(scales)
    assert (scales.dtype, scales.max() <= MOST, scales.min() >= 1 / MOST) == (np.float32, True, True)


def test_never_harmful() -> None:
    for seed in range(2):
        weight, hessian = weights(seed), correlated_hessian(seed)
        scales = channel_scales([weight], hessian, SCHEME)
        ones = np.ones(256, np.float32)
        assert scaled_error(weight, hessian, SCHEME, scales) <= scaled_error(weight, hessian, SCHEME, ones)


def test_which_norm():
    attention = [f"decoder.layers.3.self_attn.{name}_proj" for name in "qkv"]
    assert norm_before(attention) == "decoder.layers.3.input_layernorm"
    assert norm_before(["a.mlp.gate_proj", "a.mlp.up_proj"]) == "a.post_attention_layernorm"
    assert norm_before(["vision.stages.3.blocks.0.attention.qkv"]) == "vision.stages.3.blocks.0.norm"
    for layers in (attention[:2], attention[1:], ["a.mlp.gate_proj"], ["a.mlp.down_proj"], ["a.ffn.fc1"]):
        assert norm_before(layers) is None


def test_nothing_to_choose_from() -> None:
    np.testing.assert_array_equal(channel_scales([weights(0)], correlated_hessian(0), SCHEME, grid=()), 1)


def test_folding_is_exact() -> None:
    weight, inputs = weights(0), correlated_inputs(0).astype(np.float64)
    scales = channel_scales([weight], correlated_hessian(0), SCHEME).astype(np.float64)
    np.testing.assert_allclose(
        (inputs / scales) @ (weight * scales).T, inputs @ weight.T, rtol=1e-9, atol=1e-9
    )
