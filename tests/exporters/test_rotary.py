from dataclasses import replace

import mpmath
import numpy as np
import pytest

from fastvlm_convert.exporters.rotary import rotary_tables
from fastvlm_convert.weights.published import published_config


@pytest.mark.parametrize(("theta", "head_dim"), [(1e6, 64), (1e6, 128), (10_000.0, 80), (123_456.789, 10)])
def test_tables_are_right_to_the_last_bits(theta, head_dim):
    """Against 60 digits; angles are products of frequencies that were rounded to float64."""
    config = replace(published_config("7b").decoder, rope_theta=theta, head_dim=head_dim)
    cos, sin = rotary_tables(config, 40_000)
    assert cos.shape == sin.shape == (40_000, head_dim // 2)
    rng = np.random.default_rng(0)
    with mpmath.workdps(60):
        for pair in range(head_dim // 2):
            power = mpmath.mpf(theta) ** -mpmath.mpf(2 * pair / head_dim)
            for position in (0, 1, 2, *(int(p) for p in rng.integers(0, 40_000, 9))):
                angle = mpmath.mpf(position * float(power))
                assert abs(cos[position, pair] - mpmath.cos(angle)) < 2.5e-16
                assert abs(sin[position, pair] - mpmath.sin(angle)) < 2.5e-16


def test_the_whole_table_agrees_with_the_c_library():
    cos, sin = rotary_tables(published_config("0.5b").decoder, 4096)
    frequencies = 1e6 ** -(np.arange(0, 64, 2) / 64)
    angles = np.outer(np.arange(4096), frequencies)
    np.testing.assert_allclose(cos, np.cos(angles), rtol=0, atol=1e-12)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=0, atol=1e-12)
    assert not np.signbit(sin[0]).any()
    assert (cos[0] == 1).all()
