"""What a caller hands over, checked against what a function takes, and turned into what it computes with."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from fastvlm_convert.errors import ConversionError
from fastvlm_convert.mil.constants import to_tensor
from fastvlm_convert.mil.description import FunctionSpec, ValueSpec
from fastvlm_convert.mil.types import FLOAT16, shape_text

_PIL_MODES: Final = {"RGB": "RGB", "BGR": "RGB", "grayscale": "L"}


class InputError(ConversionError):
    """What was handed to a function is not what it takes."""


def prepare_inputs(function: FunctionSpec, given: Mapping[str, Any], rounded: bool) -> list[torch.Tensor]:
    """The inputs of a function in its own order.

    Args:
        function: What it takes.
        given: Arrays by name; for image inputs also pictures (`PIL.Image`) and uint8 arrays
            [height, width, 3] or [height, width]. Values stay 0 to 255: scale and bias are in the program.
        rounded: Whether inputs declared as float16 are rounded to it.

    Returns:
        float32, int32 or bool tensors; they share memory with arrays that are of that type already.

    Raises:
        InputError: An input is missing, unknown, or of another shape or type.
    """
    wanted = {i.name for i in function.inputs}
    missing, unknown = sorted(wanted - set(given)), sorted(set(given) - wanted)
    if missing or unknown:
        said = [f"lacks {', '.join(missing)}"] if missing else []
        said += [f"takes no {', '.join(str(u) for u in unknown)}"] if unknown else []
        raise InputError(
            f"function '{function.name}' {' and '.join(said)}",
            hint=f"it takes {'; '.join(f'{i.name}: {i}' for i in function.inputs) or 'nothing'}",
        )
    return [_prepare(spec, given[spec.name], rounded) for spec in function.inputs]


def _prepare(spec: ValueSpec, value: Any, rounded: bool) -> torch.Tensor:  # noqa: ANN401
    array = _image(spec, value) if spec.color is not None else np.asarray(value)
    if not spec.allows(array.shape):
        raise InputError(f"input '{spec.name}' has shape {shape_text(array.shape)}, expected {spec}")
    element = spec.type.element
    allowed = "biuf" if element.is_float else "b" if element.numpy.kind == "b" else "biu"
    if array.dtype.kind not in allowed:
        raise InputError(f"input '{spec.name}' is {array.dtype}, expected {spec}")
    tensor = to_tensor(array)
    if element.is_float:
        tensor = tensor.float()
        return tensor.half().float() if rounded and element is FLOAT16 else tensor
    if element.numpy.kind == "b":
        return tensor
    whole = array.astype(np.int64) if array.size else array
    info = np.iinfo(element.numpy)
    if whole.size and (whole.min() < info.min or whole.max() > info.max):
        raise InputError(f"input '{spec.name}' holds numbers outside of {element.name}")
    return tensor.int()


def _image(spec: ValueSpec, value: Any) -> np.ndarray:  # noqa: ANN401
    """A picture as the program takes it: [1, channels, height, width]."""
    assert spec.color is not None
    array = (
        np.asarray(value.convert(_PIL_MODES[spec.color]))
        if isinstance(value, Image.Image)
        else np.asarray(value)
    )
    if array.ndim == len(spec.shape):
        return array  # already in the program's own layout
    if array.ndim == 3 and array.shape[-1] == 3 and spec.color != "grayscale":
        ordered = array[..., ::-1] if spec.color == "BGR" else array
        return np.ascontiguousarray(ordered.transpose(2, 0, 1)[None])
    if array.ndim == 2 and spec.color == "grayscale":
        return array[None, None]
    raise InputError(
        f"input '{spec.name}' has shape {shape_text(array.shape)}, expected {spec}",
        hint="give a picture, uint8 [height, width, 3] (grayscale: [height, width]), or the program's layout",
    )
