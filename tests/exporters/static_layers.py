"""Layers whose weights and activations are integers, and what they give in integer arithmetic."""

import numpy as np

from fastvlm_convert.quantized.activations import LayerScales, TensorScale
from fastvlm_convert.quantized.schemes import AffineMatrix, AffineScheme
from fastvlm_convert.quantized.weight import QuantizedWeight

INT8 = AffineScheme(8, None, symmetric=True)
ROWS, CHANNELS, EDGE = 24, 16, 6


def weight(shape: tuple[int, ...], scales: LayerScales, seed: int = 0) -> QuantizedWeight:
    generator = np.random.default_rng(seed)
    columns = int(np.prod(shape[1:]))
    q = generator.integers(1, 256, (shape[0], columns)).astype(np.uint8)
    scale = generator.uniform(0.001, 0.01, (shape[0], 1)).astype(np.float16)
    middle = np.full((shape[0], 1), INT8.middle, np.uint8)

    def read(start: int, stop: int) -> AffineMatrix:
        return AffineMatrix(INT8, q[start:stop], scale[start:stop], middle[start:stop])

    return QuantizedWeight(shape, INT8, read, scales)


def scales_of(bits: int, output: bool) -> LayerScales:
    levels = 1 << bits
    given = TensorScale(bits, float(np.float32(8 / levels)), levels // 2 + 3) if output else None
    return LayerScales(TensorScale(bits, float(np.float32(2.5 / levels)), levels // 3), given)


def bias() -> np.ndarray:
    """float32 that float16, as which it is stored, holds."""
    return np.linspace(-1, 1, ROWS).astype(np.float16).astype(np.float32)


def integers(x: np.ndarray, scale: TensorScale) -> np.ndarray:
    """int64, without the zero point."""
    q = np.rint(x.astype(np.float64) / np.float32(scale.scale)) + scale.zero_point
    return np.clip(q, 0, scale.levels - 1).astype(np.int64) - scale.zero_point


def signed(kernel: QuantizedWeight) -> tuple[np.ndarray, np.ndarray]:
    """int64 weights as they are multiplied, and the float64 scale of each row."""
    matrix = kernel.read(0, kernel.rows)
    return matrix.q.astype(np.int64) - INT8.middle, matrix.scale[:, 0].astype(np.float64)


def expected_conv(x: np.ndarray, kernel: QuantizedWeight, scales: LayerScales) -> np.ndarray:
    """A 1 x 1 convolution in integers, int64."""
    assert scales.output is not None
    w, row_scale = signed(kernel)
    product = row_scale * np.float32(scales.input.scale)
    sums = np.einsum("oc,bchw->bohw", w, integers(x, scales.input))
    sums += np.rint(bias() / product).astype(np.int64)[:, None, None]
    steps = sums * (product / np.float32(scales.output.scale))[:, None, None]
    zero, levels = scales.output.zero_point, scales.output.levels
    return np.clip(np.rint(steps) + zero, 0, levels - 1) - zero


def pixels() -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 2, (1, CHANNELS, EDGE, EDGE)).astype(np.float32)
