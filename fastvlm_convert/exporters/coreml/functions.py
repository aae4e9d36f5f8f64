"""Build functions of a program from named inputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import coremltools
from coremltools.converters.mil.mil import Function, Var


def build_function(
    inputs: Mapping[str, Any],
    body: Callable[[Mapping[str, Var]], Sequence[Var]],
    target: coremltools.target,
) -> Function:
    """Build a function.

    Args:
        inputs: Placeholders by name (`mb.TensorSpec`, `mb.StateTensorSpec`).
        body: Adds the operations; gets the inputs, returns the outputs, each called like its operation.
        target: Oldest system that can run it.
    """
    with Function(dict(inputs), opset_version=target) as function:
        function.set_outputs(list(body(function.inputs)))
    return function
