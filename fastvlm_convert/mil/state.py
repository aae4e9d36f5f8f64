"""What persists between the calls of a function."""

from typing import Any

import numpy as np
import torch

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.description import ValueSpec
from fastvlm_convert.mil.inputs import InputError, to_held
from fastvlm_convert.mil.ops.table import held_dtype


class State:
    """The state of a model between calls, zero at first; made by `Interpreter.make_state`.

    Attributes:
        specs: Names, types and shapes of its tensors.
        tensors: Their values by name, float32, int32 or bool; the interpreter replaces them.
    """

    def __init__(self, specs: tuple[ValueSpec, ...]) -> None:
        self.specs = specs
        self.tensors: dict[str, torch.Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Set all of it to zero.

        Raises:
            BundleError: A tensor has no fixed shape, or there is no memory for it.
        """
        self.tensors = {spec.name: _zeros(spec) for spec in self.specs}

    def read_state(self, name: str) -> np.ndarray:
        """A copy of one tensor, in its declared type.

        Raises:
            InputError: There is no such state.
        """
        spec = self._spec(name)
        return self.tensors[name].numpy().astype(spec.type.element.numpy)

    def write_state(self, name: str, value: Any) -> None:  # noqa: ANN401  an array, or what becomes one
        """Replace one tensor by a copy of an array of its shape, rounded to its declared type.

        Raises:
            InputError: There is no such state, or the value has another shape or type.
        """
        self.tensors[name] = to_held(self._spec(name), value, True, "state").clone()

    def _spec(self, name: str) -> ValueSpec:
        for spec in self.specs:
            if spec.name == name:
                return spec
        raise InputError(f"there is no state '{name}'; there are {sorted(self.tensors)}")

    def __repr__(self) -> str:
        """Names and shapes."""
        return f"State({', '.join(f'{spec.name}: {spec}' for spec in self.specs)})"


def _zeros(spec: ValueSpec) -> torch.Tensor:
    shape = spec.type.fixed_shape
    if shape is None:
        raise BundleError(f"state '{spec.name}' has no fixed shape, but {spec}")
    # numpy's zeros are not touched before they are written: a long cache costs no time at first.
    kind = {torch.float32: np.float32, torch.bool: np.bool_}.get(held_dtype(spec.type.element), np.int32)
    try:
        return torch.from_numpy(np.zeros(shape, kind))
    except (MemoryError, ValueError) as error:
        raise BundleError(f"there is not enough memory for state '{spec.name}', {spec}") from error
