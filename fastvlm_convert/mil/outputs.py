"""What a function gives, in the types that a caller knows from coremltools."""

from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.description import ValueSpec

Value = np.ndarray | Image.Image | str | int | dict[str, float] | dict[int, float]

_CHANNELS: Final = {"RGB": [0, 1, 2], "BGR": [2, 1, 0]}


def handed_out(spec: ValueSpec, value: Any, exact: bool) -> Value:  # noqa: ANN401  whatever an operation gave
    """An output as its description says.

    Args:
        spec: The output.
        value: A tensor, or the label or probabilities of a classifier.
        exact: Whether floats stay float32 instead of becoming their declared type.

    Returns:
        An array; a picture for an image output: `RGBA`, `L`, or `F` for float16 gray; a label; or
        probabilities by label.

    Raises:
        BundleError: The value is of another kind.
    """
    if isinstance(value, torch.Tensor) and spec.keys is None and spec.type.element.bits:
        return _array(spec, value, exact) if spec.color is None else _picture(spec, value)
    fits = isinstance(value, dict) if spec.keys is not None else isinstance(value, str | int)
    if not fits:
        raise BundleError(f"output '{spec.name[:80]}' is not what the program declares, {spec}")
    made: Value = value
    return made


def _array(spec: ValueSpec, value: torch.Tensor, exact: bool) -> np.ndarray:
    element = spec.type.element
    if element.is_float and exact:
        return value.float().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        return value.numpy().astype(element.numpy, copy=False)


def _picture(spec: ValueSpec, value: torch.Tensor) -> Image.Image:
    """The picture of [1, channels, height, width] in 0 to 255, rounded, what lies outside clipped."""
    planes = value.float().numpy().reshape(-1, *value.shape[-2:])
    if len(planes) != (1 if spec.color not in _CHANNELS else 3):
        raise BundleError(f"output '{spec.name[:80]}' has shape {list(value.shape)}, but is {spec}")
    if spec.color == "grayscale float16":
        return Image.fromarray(planes[0].astype(np.float32))
    pixels = np.rint(np.clip(np.nan_to_num(planes), 0, 255)).astype(np.uint8)
    if spec.color not in _CHANNELS:
        return Image.fromarray(pixels[0])
    red_first = pixels[_CHANNELS[spec.color]]
    opaque = np.full_like(red_first[:1], 255)
    return Image.fromarray(np.concatenate([red_first, opaque]).transpose(1, 2, 0).copy())
