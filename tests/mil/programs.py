"""Packages built with coremltools' own MIL builder; one case a function, so that one build serves a table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813  its usual name
from coremltools.converters.mil.mil import Function, Program, types

DTYPES = {
    np.dtype(np.float32): types.fp32,
    np.dtype(np.float16): types.fp16,
    np.dtype(np.int32): types.int32,
}
STATE = "state_"  # arguments of this prefix are states


@dataclass(frozen=True)
class Case:
    """A program around one operation and what it must give.

    Attributes:
        op: The operation.
        build: Builds it with `mb`; its arguments become inputs.
        inputs: Values of the inputs, in the order of the arguments.
        expected: What must come out: computed by torch or numpy from the inputs, as tensors.
        tolerance: Largest absolute difference.
        label: Tells cases of one operation apart.
    """

    op: str
    build: Callable[..., Any]
    inputs: tuple[np.ndarray, ...]
    expected: Callable[..., Any]
    tolerance: float = 1e-5
    label: str = ""

    @property
    def id(self) -> str:
        return f"{self.op}-{self.label}" if self.label else self.op

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.build.__code__.co_varnames[: len(self.inputs)]

    def wanted(self) -> list[np.ndarray]:
        found = self.expected(*(torch.from_numpy(np.array(x)) for x in self.inputs))
        found = found if isinstance(found, tuple | list) else (found,)
        return [v.numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for v in found]


def write_cases(cases: list[Case], path: Path, target: Any) -> None:
    functions = {f"f{i}": (case.build, case.inputs) for i, case in enumerate(cases)}
    write_package(functions, path, target)


def write_merged(cases: list[Case], path: Path, target: Any) -> None:
    """All cases in one function: several functions are new in iOS 18. Inputs are called `c0_x`."""
    inputs = {f"c{i}_{a}": x for i, c in enumerate(cases) for a, x in zip(c.arguments, c.inputs, strict=True)}

    def build(**given: Any) -> list[Any]:
        made: list[Any] = []
        for i, case in enumerate(cases):
            found = case.build(*(given[f"c{i}_{a}"] for a in case.arguments))
            made += found if isinstance(found, tuple | list) else [found]
        return made

    _write({"main": _function(build, inputs, target)}, path, target)


def write_package(
    functions: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]],
    path: Path,
    target: Any = None,
    input_types: tuple[Any, ...] | None = None,
    **settings: Any,
) -> Path:
    """A package of one or more functions.

    Args:
        functions: A builder and an example (or an `mb` spec) of each of its inputs, by name.
        path: Of the package.
        target: Deployment target; iOS 18 by default.
        input_types: coremltools' descriptions of the inputs (images, ranges), for a single function.
        settings: Further ones of `ct.convert`.
    """
    target = ct.target.iOS18 if target is None else target
    made = {}
    for name, (build, inputs) in functions.items():
        arguments = build.__code__.co_varnames[: len(inputs)]
        made[name] = _function(build, dict(zip(arguments, inputs, strict=True)), target)
        if input_types is not None:
            made[name].set_input_types(input_types)
    _write(made, path, target, **settings)
    return path


def write_pipeline(stages: list[Path], path: Path) -> Path:
    """A pipeline of packages, as coremltools makes it."""
    models = [ct.models.MLModel(str(stage), skip_model_load=True) for stage in stages]
    ct.utils.make_pipeline(*models).save(str(path))
    return path


def _write(functions: Mapping[str, Function], path: Path, target: Any, **settings: Any) -> None:
    program = Program()
    for name, function in functions.items():
        program.add_function(name, function)
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = len(functions) > 1
    program.skip_all_passes = True
    ct.convert(
        program,
        convert_to="mlprogram",
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=target,
        skip_model_load=True,
        package_dir=str(path),
        pass_pipeline=ct.PassPipeline.EMPTY,
        **settings,
    )


def _function(build: Callable[..., Any], inputs: Mapping[str, Any], target: Any) -> Function:
    """A function around a builder. Core ML functions take and give float and int32 only: the rest is cast."""
    specs = {name: _spec(name, value) for name, value in inputs.items()}
    with Function(specs, target) as function:
        given = {
            name: mb.cast(x=v, dtype="bool") if getattr(inputs[name], "dtype", None) == np.bool_ else v
            for name, v in function.inputs.items()
        }
        made = build(**given)
        outputs = made if isinstance(made, tuple | list) else [made]
        function.set_outputs(
            [
                v if v.dtype in (types.fp32, types.fp16, types.int32) else mb.cast(x=v, dtype="int32")
                for v in outputs
            ]
        )
    return function


def _spec(name: str, value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    kind = mb.StateTensorSpec if name.startswith(STATE) else mb.TensorSpec
    return kind(value.shape, types.int32 if value.dtype == np.bool_ else DTYPES[value.dtype])
