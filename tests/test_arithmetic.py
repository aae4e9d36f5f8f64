"""Integer arithmetic of shapes and sizes."""

import pytest

from fastvlm_convert.arithmetic import ceil_div, num_elements


@pytest.mark.parametrize(
    ("dividend", "divisor", "expected"),
    [(0, 8, 0), (1, 8, 1), (8, 8, 1), (9, 8, 2), (2**62 + 1, 2, 2**61 + 1)],
)
def test_a_quotient_is_rounded_up_without_passing_through_floats(dividend, divisor, expected):
    assert ceil_div(dividend, divisor) == expected


@pytest.mark.parametrize(
    ("shape", "expected"), [((), 1), ((3, 0), 0), ([2, 3, 4], 24), ((2**40, 2**40), 2**80)]
)
def test_elements_are_counted_without_overflow(shape, expected):
    assert num_elements(shape) == expected
