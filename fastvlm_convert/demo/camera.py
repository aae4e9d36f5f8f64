"""Pictures as a bad camera takes them: blurred, noisy, exposed twice. A model is less sure of them."""

from typing import Final

import numpy as np
from PIL import Image

SHARPNESS: Final = (0.2, 0.3, 0.4)  # share of the edge's pixels that is left; the seed chooses
NOISE: Final = 24.0  # standard deviation of 0..255
SMALLEST: Final = 8


def badly_taken(image: Image.Image, seed: int) -> Image.Image:
    """A blurred and noisy copy of an RGB picture, the same for equal seeds."""
    share = SHARPNESS[seed % len(SHARPNESS)]
    width, height = (max(SMALLEST, int(n * share)) for n in image.size)
    small = image.resize((width, height), Image.Resampling.BILINEAR)
    values = np.asarray(small.resize(image.size, Image.Resampling.BILINEAR), np.float32)
    noise = np.random.default_rng(seed).normal(0, NOISE, values.shape)
    return Image.fromarray(np.clip(values + noise, 0, 255).astype(np.uint8))


def double_exposure(image: Image.Image, other: Image.Image) -> Image.Image:
    """An RGB picture with another one, stretched to its size, shining through."""
    return Image.blend(image, other.resize(image.size), 0.5)
