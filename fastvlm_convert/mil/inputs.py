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

_PIL_MODES: Final = {"RGB": "RGB", "BGR": "RGB", "grayscale": "L", "grayscale float16": "F"}


class InputError(ConversionError):
    """What was handed to a function is not what it takes."""

    next_step = "`fastvlm-convert mil PACKAGE` lists what every function takes and gives"


def prepare_inputs(function: FunctionSpec, given: Mapping[str, Any], rounded: bool) -> list[torch.Tensor]:
    """The inputs of a function in its own order.

    Args:
        function: What it takes.
        given: By name arrays, torch tensors, numbers or nested lists; for image inputs also pictures
            (`PIL.Image`) and uint8 arrays [height, width, 3] or [height, width]. Values stay 0 to 255: scale
            and bias are in the program. Optional inputs may be left out.
        rounded: Whether inputs declared as float16 are rounded to it.

    Returns:
        float32, int32 or bool tensors; they share memory with arrays that are of that type already.

    Raises:
        InputError: An input is missing, unknown, or of another shape or type.
    """
    check_names(function, given)
    return [
        to_held(spec, given[spec.name], rounded) if spec.name in given else _filled(spec)
        for spec in function.inputs
    ]


def check_names(function: FunctionSpec, given: Mapping[str, Any]) -> None:
    """Refuse inputs that are not a dict, not those of the function, or not all of them.

    Raises:
        InputError: They are one of these.
    """
    if not isinstance(given, Mapping):
        raise InputError(
            f"the inputs are given as {type(given).__name__}, expected a dict",
            hint=f"function '{function.name}' takes {_taken(function)}",
        )
    missing = sorted(i.name for i in function.inputs if i.name not in given and i.default is None)
    unknown = sorted(str(name) for name in set(given) - {i.name for i in function.inputs})
    if missing or unknown:
        said = [f"lacks {', '.join(missing)}"] if missing else []
        said += [f"takes no {', '.join(unknown)}"] if unknown else []
        raise InputError(
            f"function '{function.name}' {' and '.join(said)}", hint=f"it takes {_taken(function)}"
        )


def to_held(spec: ValueSpec, value: Any, rounded: bool, what: str = "input") -> torch.Tensor:  # noqa: ANN401
    """One value as operations compute with it, see `prepare_inputs`.

    Args:
        spec: What it must be.
        value: What was given.
        rounded: Whether float16 is rounded to.
        what: What it is, for messages.

    Raises:
        InputError: It is of another shape or type.
    """
    label = f"{what} '{spec.name}'"
    array = _image(spec, value, label) if spec.color is not None else _array(spec, value, label)
    if not spec.allows(array.shape):
        raise InputError(f"{label} has shape {shape_text(array.shape)}, expected {spec}")
    element = spec.type.element
    allowed = "biuf" if element.is_float else "b" if element.numpy.kind == "b" else "biu"
    if array.dtype.kind not in allowed:
        raise InputError(f"{label} is {array.dtype}, expected {spec}")
    tensor = to_tensor(array)
    if element.is_float:
        tensor = tensor.float()
        return tensor.half().float() if rounded and element is FLOAT16 else tensor
    if element.numpy.kind == "b":
        return tensor
    info = np.iinfo(element.numpy)
    if array.size and (int(array.min()) < info.min or int(array.max()) > info.max):
        raise InputError(f"{label} holds numbers outside of {element.name}")
    return tensor.int()


def _taken(function: FunctionSpec) -> str:
    return "; ".join(f"{i.name}: {i}" for i in function.inputs) or "nothing"


def _filled(spec: ValueSpec) -> torch.Tensor:
    assert spec.default is not None
    with np.errstate(invalid="ignore", over="ignore"):
        filled = np.full(spec.example_shape, spec.default).astype(spec.type.element.numpy)
    return to_held(spec, filled, False)


def _array(spec: ValueSpec, value: Any, label: str) -> np.ndarray:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype is torch.bfloat16 else value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, sparse tensors
        raise InputError(f"{label} is no array, expected {spec}") from error
    if array.dtype == object:
        raise InputError(f"{label} is {type(value).__name__}, expected {spec}")
    return array


def _image(spec: ValueSpec, value: Any, label: str) -> np.ndarray:  # noqa: ANN401
    """A picture as the program takes it: [1, channels, height, width]."""
    assert spec.color is not None
    is_gray = spec.color.startswith("grayscale")
    if isinstance(value, Image.Image):
        array = np.asarray(value.convert(_PIL_MODES[spec.color]))
    else:
        array = _array(spec, value, label)
    if array.ndim == len(spec.shape):
        return array  # already in the program's own layout
    if array.ndim == 3 and array.shape[-1] == 3 and not is_gray:
        ordered = array[..., ::-1] if spec.color == "BGR" else array
        return np.ascontiguousarray(ordered.transpose(2, 0, 1)[None])
    if array.ndim == 2 and is_gray:
        return array[None, None]
    raise InputError(
        f"{label} has shape {shape_text(array.shape)}, expected {spec}",
        hint="give a picture, uint8 [height, width, 3] (grayscale: [height, width]), or the program's layout",
    )
