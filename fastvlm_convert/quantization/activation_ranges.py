"""Ranges of activations: seen picture by picture in bounded memory, chosen by mean squared error."""

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fastvlm_convert.quantized.activations import ActivationBits, TensorScale

_BINS: Final = 4096
_SAMPLES: Final = 1 << 20  # of one tensor of one picture: evenly spaced ones, beside its true extremes
_SHARES: Final = tuple(1 - n / 40 for n in range(33))  # of either end of the range
_ROUNDS: Final = 2
_LEAST_RANGE: Final = 2.0**-20  # of a tensor of zeros

OnValues = Callable[[Tensor], Tensor]


class RangeObserver:
    """A histogram between powers of two, which doubles its range when a value lies outside."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_BINS, dtype=torch.float64)
        self._edge = 2.0**-20
        self._least = self._most = 0.0

    def add(self, values: Tensor) -> None:
        """Count the values of a tensor of any shape."""
        least, most = (float(x) for x in torch.aminmax(values))
        self._least, self._most = min(self._least, least), max(self._most, most)
        while max(most, -least) > self._edge:
            quarter = _BINS // 4
            merged = self._counts.view(-1, 2).sum(1)
            self._counts = torch.zeros(_BINS, dtype=torch.float64)
            self._counts[quarter : quarter + _BINS // 2] = merged
            self._edge *= 2
        flat = values.reshape(-1)
        flat = flat[:: max(1, flat.numel() // _SAMPLES)]
        self._counts += torch.histc(flat, _BINS, -self._edge, self._edge).double()

    def scale(self, bits: ActivationBits, then: OnValues | None = None) -> TensorScale:
        """The scale with the least squared error; of 16 bits, that of the whole range.

        Args:
            bits: Of the integers.
            then: What the network makes of the values next: errors that this hides do not count.
        """
        if bits == 16:
            return _scale_of(self._least, self._most, bits)
        width = 2 * self._edge / _BINS
        centers = torch.arange(_BINS, dtype=torch.float64) * width + (width / 2 - self._edge)
        used = self._counts > 0
        centers, counts = centers[used], self._counts[used]
        exact = centers if then is None else then(centers)

        def loss(low: float, high: float) -> float:
            rounded = _rounded(centers, _scale_of(self._least * low, self._most * high, bits))
            error = (rounded if then is None else then(rounded)) - exact
            return float((counts * error * error).sum())

        # One end after the other: they hardly depend on each other, and all pairs take eight times as long.
        low = high = 1.0
        for _ in range(_ROUNDS):
            high = min(_SHARES, key=lambda share: loss(low, share)) if self._most > 0 else high
            low = min(_SHARES, key=lambda share: loss(share, high)) if self._least < 0 else low
        return _scale_of(self._least * low, self._most * high, bits)


def _scale_of(least: float, most: float, bits: ActivationBits) -> TensorScale:
    """The scale whose integers reach from one value, not above 0, to another, not below.

    Of 8 bits it is a float16, rounded up so that neither end is cut: float16 programs hold the same one.
    """
    levels = 1 << bits
    exact = np.float32(max(most - least, _LEAST_RANGE) / (levels - 1))
    scale = float(exact if bits == 16 else _float16_above(exact))
    return TensorScale(bits, scale, min(levels - 1, max(0, round(-least / scale))))


def _float16_above(value: np.float32) -> np.float16:
    nearest = np.float16(value)
    return nearest if nearest >= value else np.nextafter(nearest, np.float16(np.inf))


def _rounded(values: Tensor, scale: TensorScale) -> Tensor:
    q = (torch.round(values / scale.scale) + scale.zero_point).clamp(0, scale.levels - 1)
    return (q - scale.zero_point) * scale.scale
