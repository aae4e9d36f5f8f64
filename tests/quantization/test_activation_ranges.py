"""Scales of activations: what they reach, and that float16 holds those of 8 bits."""

import numpy as np
import pytest
import torch

from fastvlm_convert.quantization.activation_ranges import RangeObserver


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.3, 7.7, 4e4])
def test_a_float16_program_holds_the_scale_and_no_end_is_cut(size):
    observer = RangeObserver()
    ends = torch.tensor([-0.4 * size, size])  # equally often, so that no end is worth cutting
    observer.add(ends.repeat(8))
    scale = observer.scale(8)
    assert scale.scale == float(np.float16(scale.scale)) > 0
    low, high = -scale.zero_point * scale.scale, (255 - scale.zero_point) * scale.scale
    step = scale.scale
    assert low - step <= -0.4 * size
    assert high + step >= size
    if size > 1e-2:  # float16 has its eleven digits
        assert high - low == pytest.approx(1.4 * size, rel=0.03)


def test_zeros_have_a_scale():
    observer = RangeObserver()
    observer.add(torch.zeros(4))
    assert np.float16(observer.scale(8).scale) > 0
    assert observer.scale(16).scale > 0
