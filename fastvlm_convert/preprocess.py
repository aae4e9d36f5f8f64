"""RGB image -> pixel_values, exactly as the original code does it. NumPy and PIL only.

Sources: ml-fastvlm `llava/mm_utils.py` (`expand2square`); transformers' `CLIPImageProcessor`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from PIL import Image

from fastvlm_convert.errors import ImageError
from fastvlm_convert.pictures import MAX_PIXELS

ImageMode = Literal["pad", "crop"]
Resampling = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

# By the number that Pillow and transformers give them.
RESAMPLINGS: Final[tuple[Resampling, ...]] = get_args(Resampling)

_STRIP_PIXELS: Final = 16_000_000  # of a padded picture at a time


@dataclass(frozen=True)
class ImageSettings:
    """How a picture becomes the vision encoder's input.

    Attributes:
        size: Edge of the square input in pixels.
        mode: How an image is made square: `pad` adds ground on two sides, `crop` cuts the longer edge.
        resampling: Pillow's filter.
        rescale_factor: What 8-bit values are multiplied by.
        mean: Subtracted from the rescaled values, by channel.
        std: What they are divided by then.
        in_graph: Whether the vision graph itself does all that, so that it is given the picture as it is.
    """

    size: int
    mode: ImageMode
    resampling: Resampling = "bicubic"
    rescale_factor: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    in_graph: bool = False

    @property
    def is_normalized(self) -> bool:
        """Whether mean and deviation change anything."""
        return any(self.mean) or self.std != (1.0, 1.0, 1.0)

    @property
    def ground(self) -> tuple[int, int, int]:
        """What `pad` adds: the mean color, as `expand2square` rounds it."""
        red, green, blue = (int(x * 255) for x in self.mean)
        return red, green, blue


def square(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """Make an RGB image `size` x `size`.

    `pad` keeps the whole picture, as the reference does. `crop` resizes the shorter edge first and crops
    then, as transformers and Apple's app do; on a wide image the content beyond the square is lost.

    Raises:
        ImageError: Cropping would blow a narrow strip up absurdly.
    """
    size, resample = settings.size, Image.Resampling[settings.resampling.upper()]
    if settings.mode == "pad":
        return _padded(image, size, resample, settings.ground)
    short = min(image.size)
    width, height = size * image.width // short, size * image.height // short
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"an image of {image.width} x {image.height} pixels is too narrow to crop {size} x {size} "
            "from it",
            hint="cut it, or set common.image_mode to pad in the recipe",
        )
    resized = image.resize((width, height), resample)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def _padded(
    image: Image.Image, size: int, resample: Image.Resampling, ground: tuple[int, int, int]
) -> Image.Image:
    """Pad to a square and resize, without holding the padded square of a long, narrow picture.

    Pillow resizes rows first and columns then, with 8 bits between; so strips of rows can take the first
    step on their own, and every bit stays the same.
    """
    edge = max(image.size)
    narrowed = Image.new("RGB", (size, edge))
    for top, strip in _padded_strips(image, edge, ground):
        narrowed.paste(strip.resize((size, strip.height), resample), (0, top))
    return narrowed.resize((size, size), resample)


def _padded_strips(
    image: Image.Image, edge: int, ground: tuple[int, int, int]
) -> Iterator[tuple[int, Image.Image]]:
    """Strips of a picture in the middle of a square of an edge, each with its first row."""
    left, above = (edge - image.width) // 2, (edge - image.height) // 2
    rows = max(1, _STRIP_PIXELS // edge)
    for top in range(0, edge, rows):
        strip = Image.new("RGB", (edge, min(rows, edge - top)), ground)
        strip.paste(image, (left, above - top))
        yield top, strip


def pixel_values(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """What the vision graph is given, float32 [1, 3, size, size], RGB; in 0..1 where nothing is normalized.

    A graph that prepares pictures itself is given [1, 3, height, width] in 0..1.

    Args:
        image: An RGB image of any size.
        settings: How it is made square, scaled and normalized.
    """
    if settings.in_graph:
        return _planes(np.asarray(image), ImageSettings(settings.size, settings.mode))
    return _planes(np.asarray(square(image, settings)), settings)


def picture_of(values: np.ndarray, settings: ImageSettings) -> Image.Image:
    """The square 8-bit picture that pixel values came from; exact, for they hold few of a float's values.

    Args:
        values: float32 [1, 3, size, size], scaled and normalized.
        settings: How.
    """
    planes = values[0] * np.array(settings.std, np.float32)[:, None, None]
    planes = planes + np.array(settings.mean, np.float32)[:, None, None]
    scaled = np.rint(planes.transpose(1, 2, 0) / settings.rescale_factor).astype(np.uint8)
    return Image.fromarray(scaled, "RGB")


def channel_values(settings: ImageSettings) -> np.ndarray:
    """What each 8-bit value of each channel becomes, float32 [3, 256]."""
    pixels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)[None]
    return _planes(pixels, settings)[0, :, 0]


def _planes(pixels: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """uint8 [height, width, 3], scaled and normalized; float32 [1, 3, height, width]."""
    scaled = pixels.astype(np.float64) * settings.rescale_factor
    planes = np.ascontiguousarray(scaled.transpose(2, 0, 1)[None], np.float32)
    if not settings.is_normalized:
        return planes
    mean, std = (np.asarray(x, np.float32)[:, None, None] for x in (settings.mean, settings.std))
    return np.ascontiguousarray((planes - mean) / std)
