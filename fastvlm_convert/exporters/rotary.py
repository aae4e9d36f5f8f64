"""Tables of the rotary position embedding (arXiv:2104.09864), the same bits on every machine.

Powers, sines and cosines of numpy and of the C library end in other bits on other processors, and at position
30,000 a last bit of the angle shows in float32. So frequencies are rounded from 40 digits, and what follows
uses only operations that IEEE 754 rounds correctly. Reduction and polynomials are those of fdlibm
(https://www.netlib.org/fdlibm: e_rem_pio2.c, k_sin.c, k_cos.c).
"""

from decimal import Context, Decimal
from typing import Final

import numpy as np

from fastvlm_convert.weights.model_config import DecoderConfig

_DIGITS: Final = Context(prec=40)
_POSITIONS: Final = 1024  # computed at a time

# pi / 2 in three parts, of which the first two have 33 bits: their multiples below 2^20 are exact.
_HALF_PI: Final = (1.57079632673412561417, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
# Coefficients for |x| <= pi / 4, highest power first: x + x^3 S(x^2) and 1 - x^2 / 2 + x^4 C(x^2).
_SINE: Final = (
    1.58969099521155010221e-10, -2.50507602534068634195e-08, 2.75573137070700676789e-06,
    -1.98412698298579493134e-04, 8.33333333332248946124e-03, -1.66666666666666324348e-01,
)  # fmt: skip
_COSINE: Final = (
    -1.13596475577881948265e-11, 2.08757232129817482790e-09, -2.75573143513906633035e-07,
    2.48015872894767294178e-05, -1.38888888888741095749e-03, 4.16666666666666019037e-02,
)  # fmt: skip


def rotary_tables(config: DecoderConfig, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the angle of every pair at every position.

    Args:
        config: Dimensions.
        positions: Positions from 0 on, below 2^20.

    Returns:
        Two arrays, float64 [positions, head_dim / 2], right to the last bits of float64.
    """
    frequencies = _frequencies(config)
    cos, sin = (np.empty((positions, len(frequencies))) for _ in range(2))
    for start in range(0, positions, _POSITIONS):
        rows = slice(start, min(start + _POSITIONS, positions))
        cos[rows], sin[rows] = _cos_sin(np.arange(rows.start, rows.stop)[:, None] * frequencies)
    return cos, sin


def _frequencies(config: DecoderConfig) -> np.ndarray:
    base, half = Decimal(config.rope_theta), config.head_dim // 2
    return np.array([float(_DIGITS.power(base, Decimal(-i / half))) for i in range(half)])


def _cos_sin(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of angles from 0 to 2^20, float64."""
    quarters = np.rint(angles / (np.pi / 2))
    rest = angles
    for part in _HALF_PI:
        rest = rest - quarters * part
    square = rest * rest
    sine = rest + rest * square * _polynomial(_SINE, square)
    cosine = 1 - (square / 2 - square * square * _polynomial(_COSINE, square))
    quadrant = quarters.astype(np.int64) % 4
    odd = quadrant % 2 == 1
    cos, sin = np.where(odd, sine, cosine), np.where(odd, cosine, sine)
    return np.where((quadrant == 1) | (quadrant == 2), -cos, cos), np.where(quadrant >= 2, -sin, sin)


def _polynomial(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value
