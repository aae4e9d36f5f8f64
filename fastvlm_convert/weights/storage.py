"""How floats are stored: the one conversion to a file's dtype, and the values that may not get there."""

from typing import Final

import numpy as np

from fastvlm_convert.errors import CheckpointError, RecipeError
from fastvlm_convert.io_names import FloatName
from fastvlm_convert.weights.source import Weight, WeightSource

FLOAT16_MAX: Final = 65504.0  # the largest finite float16


def to_storage(values: np.ndarray, dtype: FloatName, name: str) -> np.ndarray:
    """Convert values to the dtype they are stored in.

    Args:
        values: Floats of any shape.
        dtype: Dtype in the file.
        name: The tensor's name, for messages.

    Returns:
        The values in `dtype`, all finite; the same array where it has that dtype already.

    Raises:
        RecipeError: A value is beyond float16's range.
        CheckpointError: A value is NaN or infinite before float16 comes into it.
    """
    with np.errstate(over="ignore"):
        stored: np.ndarray = values.astype(dtype, copy=False)
    if np.isfinite(stored).all():
        return stored
    broken = stored if dtype == "float32" else values
    if not np.isfinite(broken).all():
        raise _not_finite(name, broken, f"conversion to {dtype}")
    raise RecipeError(
        f"weight '{name}' reaches {float(np.abs(values).max()):.4g}, beyond float16's {FLOAT16_MAX:.0f}",
        hint="store that component as float32 in the recipe; for a bias of keys, "
        "`scan -o FILE` writes a recipe that repairs it",
    )


def checked(weights: WeightSource, before: WeightSource, step: str) -> dict[str, Weight]:
    """A view that refuses NaN and infinity in what a step made.

    Tensors in files are checked where they are read, so only what the step changed or added is looked at.

    Args:
        weights: What the step made.
        before: What it was given.
        step: What it is called in messages, for example `merging the adapter`.

    Returns:
        The same weights; reading one raises `CheckpointError` where a value is not finite.
    """
    return {
        name: weight if weight is before.get(name) else _checked(name, weight, step)
        for name, weight in weights.items()
    }


def _checked(name: str, weight: Weight, step: str) -> Weight:
    def read(start: int, stop: int) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            values = weight.read(start, stop)
        if not np.isfinite(values).all():
            raise _not_finite(name, values, step)
        return values

    return Weight(weight.shape, weight.dtype, read)


def _not_finite(name: str, values: np.ndarray, step: str) -> CheckpointError:
    bad = int(values.size - np.isfinite(values).sum())
    return CheckpointError(
        f"weight '{name}' holds {bad} values that are NaN or infinite after {step}",
        hint="what it is computed from is finite but too large; check the adapter's scale, and that training "
        "did not diverge",
    )
