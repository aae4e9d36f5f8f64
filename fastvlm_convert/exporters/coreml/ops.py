"""The operations both packages are made of, each in the precision its name asks for."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb  # noqa: N813  coremltools' own convention
from coremltools.converters.mil.mil import Var, types

from fastvlm_convert.errors import RecipeError
from fastvlm_convert.exporters.coreml.weights import Weights
from fastvlm_convert.io_names import FloatName
from fastvlm_convert.quantized.weight import (
    AnyWeight,
    PaletteWeight,
    QuantizedWeight,
    alike,
    stacked,
)
from fastvlm_convert.recipe import FloatSettings
from fastvlm_convert.weights.source import Weight

_FEW = 6  # names that an error message gives as examples

_MIL_NAMES: dict[FloatName, str] = {"float32": "fp32", "float16": "fp16"}
_MIL_TYPES = {"float32": types.fp32, "float16": types.fp16}
_FLOATS = {types.fp32: "float32", types.fp16: "float16"}


def mil_type(dtype: FloatName) -> Any:  # noqa: ANN401
    """The type that coremltools has for a dtype."""
    return _MIL_TYPES[dtype]


def scalar(dtype: FloatName, value: float) -> np.floating:
    """A number in a dtype: operations want their constants in the dtype of their inputs."""
    return np.float16(value) if dtype == "float16" else np.float32(value)


class Ops:
    """Adds operations to the function under construction.

    A value has the dtype of the operation that made it; an operation of another dtype casts what it reads. So
    neighbouring operations that a recipe keeps in float32 form one island with casts only at its shores.

    Args:
        weights: Where constants come from.
        precision: Storage and compute dtype.
    """

    def __init__(self, weights: Weights, precision: FloatSettings) -> None:
        self.weights = weights
        self.precision = precision
        self._casts: dict[tuple[str, FloatName], Var] = {}
        self._names: set[str] = set()

    def start_function(self) -> None:
        """Call first in each function."""
        # coremltools numbers automatic names through the whole process; bytes must not depend on that.
        mb.name_count.clear()
        self.weights.start_function()
        self._casts = {}

    def dtype(self, name: str) -> FloatName:
        """Dtype in which the operation of a name computes."""
        self._names.add(name)
        return self.precision.computes_in(name)

    def check_patterns(self, component: str) -> None:
        """See that every pattern of `float32_ops` matched an operation.

        Raises:
            RecipeError: Names the pattern that matched none.
        """
        for pattern in self.precision.float32_ops:
            if not any(fnmatchcase(name, pattern) for name in self._names):
                known = ", ".join(sorted(self._names)[:_FEW])
                raise RecipeError(
                    f"{component}.float32_ops: '{pattern}' matches no operation",
                    hint=f"operations are called {known}, ...; `fastvlm-convert scan` lists them",
                )

    def cast(self, x: Var, dtype: FloatName) -> Var:
        """The value in another dtype; anything but floats is left alone."""
        if _FLOATS.get(x.dtype, dtype) == dtype:
            return x
        key = (x.name, dtype)
        if key not in self._casts:
            self._casts[key] = mb.cast(x=x, dtype=_MIL_NAMES[dtype], name=f"{x.name}_{dtype}")
        return self._casts[key]

    def op(self, kind: str, name: str, dtype: FloatName | None = None, **arguments: Any) -> Var:  # noqa: ANN401
        """Add an operation whose float inputs are in its dtype.

        Args:
            kind: Operator of the MIL builder.
            name: Unique name; an identifier.
            dtype: Its dtype where it is not the one its own name asks for.
            **arguments: Inputs and attributes.
        """
        dtype = dtype or self.dtype(name)
        given = {
            key: [self.cast(v, dtype) for v in value]
            if isinstance(value, list) and value and isinstance(value[0], Var)
            else self.cast(value, dtype)
            if isinstance(value, Var) and not types.is_state(value.sym_type)
            else value
            for key, value in arguments.items()
        }
        return getattr(mb, kind)(name=name, **given)

    def weight(self, key: str, owner: str, *weights: AnyWeight) -> Var:
        """A weight, or several stacked, in the dtype in which the operation `owner` computes."""
        dtype = self.dtype(owner)
        if integers := alike(QuantizedWeight, weights):
            return self.weights.affine(key, dtype, stacked(integers))
        if palettes := alike(PaletteWeight, weights):
            return self.weights.palette(key, dtype, stacked(palettes))
        return self.weights.weight(key, self.precision.storage, dtype, *alike(Weight, weights))

    def linear(
        self, name: str, x: Var, weights: Sequence[AnyWeight], biases: Sequence[AnyWeight] | None = None
    ) -> Var:
        """Multiply by W^T and add a bias; several weights are stacked along their output rows."""
        rows = sum(w.shape[0] for w in weights)
        dtype = self.dtype(name)
        if biases:
            bias = self.weight(f"{name}_bias", name, *biases)
        else:  # without one, the builder would write a blob of zeros for every layer
            bias = self.weights.constant(f"zeros_{rows}_{dtype}", dtype, dtype, np.zeros(rows))
        return self.op("linear", name, x=x, weight=self.weight(f"{name}_weight", name, *weights), bias=bias)

    def conv(
        self, name: str, x: Var, weight: AnyWeight, bias: AnyWeight, stride: int = 1, groups: int = 1
    ) -> Var:
        """Convolution with "same" padding."""
        return self.op(
            "conv",
            name,
            x=x,
            weight=self.weight(f"{name}_weight", name, weight),
            bias=self.weight(f"{name}_bias", name, bias),
            strides=[stride] * 2,
            pad_type="custom",
            pad=[weight.shape[2] // 2] * 4,
            dilations=[1, 1],
            groups=groups,
        )

    def gelu(self, x: Var) -> Var:
        """Exact GELU, named after what it reads."""
        return self.op("gelu", f"{x.name}_gelu", x=x, mode="EXACT")
