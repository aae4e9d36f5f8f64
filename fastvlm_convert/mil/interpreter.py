"""Run the functions of a Core ML package: the stored program with the stored weights, on any machine.

It checks program and weights, not Apple's kernels. torch's CPU kernels compute the operations.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.constants import Constant, Weights
from fastvlm_convert.mil.description import (
    ValueSpec,
    default_function,
    describe_functions,
    metadata,
)
from fastvlm_convert.mil.inputs import InputError, prepare_inputs
from fastvlm_convert.mil.package import open_package
from fastvlm_convert.mil.plan import Plan, Precision, plan_function
from fastvlm_convert.mil.steps import CallStep, Frame, Step, round_half

EXECUTED_BY: Final = "interpreter"
# Operations that only move values, but may round them on the way.
_ROUNDING_MOVES: Final = frozenset({"cast", "write_state"})


@dataclass(frozen=True)
class OpResult:
    """What one operation gave, for a scan or a profile.

    Attributes:
        function: The function it is in.
        name: Name of its first result.
        type: The operation.
        outputs: float32, int32 or bool arrays by name. They are the run's own: not to be changed, and to be
            copied if they are kept.
    """

    function: str
    name: str
    type: str
    outputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class NonFinite:
    """The first operation that made infinity, or NaN, of inputs that held none.

    Attributes:
        function: The function it is in.
        name: Name of its first result.
        type: The operation.
        kind: What it made.
        count: In how many elements.
    """

    function: str
    name: str
    type: str
    kind: Literal["inf", "nan"]
    count: int

    def __str__(self) -> str:
        """For reports."""
        return f"{self.count} x {self.kind} first made by '{self.name}' ({self.type}) in '{self.function}'"


class State:
    """The state of a model between calls, zero at first. Made by `Interpreter.make_state`."""

    def __init__(self, specs: tuple[ValueSpec, ...]) -> None:
        self.specs = specs
        self.tensors: dict[str, torch.Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Zero again."""
        # numpy's zeros are not touched before they are written: a long cache costs no time at first.
        self.tensors = {s.name: torch.from_numpy(np.zeros(_fixed(s), _held_as(s))) for s in self.specs}

    def read(self, name: str) -> np.ndarray:
        """A copy of one tensor, in its declared type.

        Raises:
            InputError: There is no such state.
        """
        for spec in self.specs:
            if spec.name == name:
                return self.tensors[name].numpy().astype(spec.type.element.numpy)
        raise InputError(f"there is no state '{name}'; there are {sorted(self.tensors)}")


class Interpreter:
    """A package, ready to run.

    Args:
        package: The `.mlpackage` folder.
        precision: `exact` computes in float32 on the stored weights; only states are rounded to the float16
            they are stored in. `device` rounds every result, and every intermediate result of attention,
            softmax, norms and reductions, to float16 where the program declares float16, so that overflow and
            rounding show as on a phone that accumulates in float16. Products of matrices and convolutions
            accumulate in float32 in both.
        check_finite: Look for NaN and infinity in what operations make, see `nonfinite`.

    Attributes:
        functions: What each function takes and gives.
        default_function: The one that runs when none is named.
        metadata: What the author wrote into the package.
        nonfinite: Of the last run: the operation that first made infinity and the one that first made NaN of
            inputs that held none, in the order in which they ran.

    Raises:
        BundleError: It is no package, damaged, or cannot be run; says which operation is why.
    """

    def __init__(
        self, package: Path | str, precision: Precision = "exact", *, check_finite: bool = True
    ) -> None:
        if precision not in ("exact", "device"):
            raise InputError(f"precision is {precision!r}, expected 'exact' or 'device'")
        opened = open_package(Path(package))
        self.path = opened.path
        self.precision = precision
        self.functions = describe_functions(opened)
        self.default_function = default_function(opened)
        self.metadata = metadata(opened)
        self.nonfinite: tuple[NonFinite, ...] = ()
        self._check_finite = check_finite
        self._weights = Weights(precision == "device")
        self._plans = {name: plan_function(opened, spec, precision) for name, spec in self.functions.items()}

    @property
    def decoded_bytes(self) -> int:
        """Memory that the weights decoded so far take."""
        return self._weights.nbytes

    def make_state(self, function: str | None = None) -> State:
        """A new state for a function, and for all others with the same states.

        Raises:
            InputError: There is no such function.
            BundleError: A state has no fixed shape.
        """
        return State(self._plan(function).spec.states)

    @torch.inference_mode()
    def run(
        self,
        inputs: Mapping[str, Any],
        function: str | None = None,
        state: State | None = None,
        on_op: Callable[[OpResult], None] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run a function.

        Args:
            inputs: Arrays by name, for image inputs also pictures, see `inputs.prepare_inputs`.
            function: Which one; the default one if None.
            state: What persists between calls; changed by the run. Needed if the function has states.
            on_op: Called with what each operation gave.

        Returns:
            Outputs by name. Floats are float32 in `exact`, and of their declared type in `device`; integers
            are of their declared type.

        Raises:
            InputError: There is no such function, or it takes other inputs or another state.
            BundleError: An operation cannot be computed; says which one. A state may be half updated then.
        """
        plan = self._plan(function)
        tensors = prepare_inputs(plan.spec, inputs, self.precision == "device")
        watch = _Watch(plan.spec.name, self._check_finite, on_op)
        frame = Frame(
            [None] * plan.num_slots,
            self._states(plan, state),
            self._weights,
            watch.observe if self._check_finite or on_op is not None else None,
        )
        for slot, tensor in zip(plan.block.inputs, tensors, strict=True):
            frame.values[slot] = tensor
        plan.block.run(frame)
        self.nonfinite = tuple(watch.found)
        outputs: dict[str, np.ndarray] = {}
        for spec, ref, value in zip(
            plan.spec.outputs, plan.block.outputs, plan.block.results(frame), strict=True
        ):
            if not isinstance(value, torch.Tensor):
                raise BundleError(f"output '{spec.name}' of function '{plan.spec.name}' is no tensor")
            shared = isinstance(ref, Constant) or ref in plan.copied
            outputs[spec.name] = self._handed_out(spec, value.clone() if shared else value)
        return outputs

    def _handed_out(self, spec: ValueSpec, value: torch.Tensor) -> np.ndarray:
        element = spec.type.element
        if element.is_float and self.precision == "exact":
            return value.float().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            return value.numpy().astype(element.numpy, copy=False)

    def _plan(self, function: str | None) -> Plan:
        name = self.default_function if function is None else function
        if name not in self._plans:
            raise InputError(
                f"there is no function '{name}'; there are {', '.join(self._plans)}", where=self.path
            )
        return self._plans[name]

    def _states(self, plan: Plan, state: State | None) -> dict[str, torch.Tensor]:
        wanted = {s.name: s.type for s in plan.spec.states}
        have = {} if state is None else {s.name: s.type for s in state.specs}
        if state is None and wanted:
            raise InputError(
                f"function '{plan.spec.name}' has states: {', '.join(wanted)}",
                hint="run it with state=interpreter.make_state(), the same one in every call",
            )
        if wanted.items() - have.items():
            raise InputError(f"the state does not fit function '{plan.spec.name}'")
        return {} if state is None else state.tensors


class _Watch:
    """Looks at what each operation gives."""

    def __init__(self, function: str, check: bool, on_op: Callable[[OpResult], None] | None) -> None:
        self.found: list[NonFinite] = []
        self._function = function
        self._open = {"inf", "nan"} if check else set()
        self._on_op = on_op

    def observe(self, step: Step, given: dict[str, Any], results: tuple[Any, ...]) -> None:
        """Report results; note the first infinity and the first NaN."""
        if self._open and (not step.moves or step.type in _ROUNDING_MOVES):
            for result in results:
                if result is not given.get("x") and not _is_finite(result):
                    self._look(step, given, result)
        elif self._open and isinstance(step, CallStep) and step.rounds_update:
            rounded = round_half(given["update"])
            if not _is_finite(rounded):
                self._look(step, {"update": given["update"]}, rounded)
        if self._on_op is not None:
            # Writing a state has a result, but no name.
            pairs = zip(step.outputs, results, strict=False)
            arrays = {o.name: r.numpy() for o, r in pairs if isinstance(r, torch.Tensor)}
            self._on_op(OpResult(self._function, step.name, step.type, arrays))

    def _look(self, step: Step, given: dict[str, Any], result: torch.Tensor) -> None:
        taken = [v for value in given.values() for v in (value if isinstance(value, list) else [value])]
        tests: tuple[tuple[Literal["inf", "nan"], Callable[[torch.Tensor], torch.Tensor]], ...] = (
            ("inf", torch.isinf),
            ("nan", torch.isnan),
        )
        for kind, test in tests:
            count = int(test(result).sum())
            if kind not in self._open or not count:
                continue
            if not any(test(v).any() for v in taken if isinstance(v, torch.Tensor) and v.is_floating_point()):
                self._open.discard(kind)
                self.found.append(NonFinite(self._function, step.name, step.type, kind, count))


def _is_finite(result: torch.Tensor) -> bool:
    """Whether all elements are; their sum tells with one pass and no copy."""
    return result.dtype is not torch.float32 or math.isfinite(result.sum().item())


def _fixed(spec: ValueSpec) -> tuple[int, ...]:
    shape = spec.type.fixed_shape
    if shape is None:
        raise BundleError(f"state '{spec.name}' has no fixed shape, but {spec}")
    return shape


def _held_as(spec: ValueSpec) -> type[np.generic]:
    kind = spec.type.element.numpy.kind
    return np.float32 if kind == "f" else np.bool_ if kind == "b" else np.int32
