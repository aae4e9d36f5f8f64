"""Run a Core ML package on any machine: the stored program with the stored weights, not Apple's kernels.

    from fastvlm_convert.mil import Interpreter

    interpreter = Interpreter("model.mlpackage")
    outputs = interpreter.predict({"x": np.zeros((1, 3), np.float32)})

Usable alone, with numpy, torch, Pillow and coremltools' file format; its manual is `docs/interpreter.md`.
The files: `package` (the folder), `blob` (the weights in it), `values` and `description` (the protobuf as
plain data), `constants` (weights decoded on demand), `scope`, `calls`, `plan` and `memory` (a function as a
list of `steps`), `footprint` (the memory it takes), `ops` (one function an operation), `inputs`, `outputs`,
`state`, `watch` and `interpreter`; `survey` and `profile` look at a package.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlm_convert.mil.inputs import InputError
    from fastvlm_convert.mil.interpreter import Interpreter
    from fastvlm_convert.mil.state import State
    from fastvlm_convert.mil.watch import NonFinite, OpResult

__all__ = ["InputError", "Interpreter", "NonFinite", "OpResult", "State"]

_HOMES = {
    "InputError": "inputs",
    "Interpreter": "interpreter",
    "NonFinite": "watch",
    "OpResult": "watch",
    "State": "state",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  any of `__all__`
    """Import a public name when it is first asked for: a survey does not need torch."""
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
