"""Run the functions of a Core ML package: the stored program with the stored weights, on any machine.

It checks program and weights, not Apple's kernels. torch's CPU kernels compute the operations.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, overload

import torch

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.constants import Constant, Weights
from fastvlm_convert.mil.description import (
    DEFAULT_FUNCTION,
    FunctionSpec,
    default_function,
    describe_functions,
    describe_pipeline,
    metadata,
)
from fastvlm_convert.mil.footprint import machine_bytes
from fastvlm_convert.mil.inputs import InputError, check_names, prepare_inputs
from fastvlm_convert.mil.outputs import Value, handed_out
from fastvlm_convert.mil.package import Package, open_package
from fastvlm_convert.mil.plan import Plan, Precision, plan_function
from fastvlm_convert.mil.state import State
from fastvlm_convert.mil.steps import Frame
from fastvlm_convert.mil.watch import NonFinite, OnOp, Watch

EXECUTED_BY: Final = "interpreter"

Inputs = Mapping[str, Any]


class Interpreter:
    """A package, ready to run; what coremltools' `MLModel` is on a Mac.

    Args:
        package: The `.mlpackage` folder.
        precision: `exact` computes in float32 on the stored weights; only states are rounded to the float16
            they are stored in. `device` rounds every result, and every intermediate result of attention,
            softmax, norms and reductions, to float16 where the program declares float16, so that overflow and
            rounding show as on a phone that accumulates in float16. Products of matrices and convolutions
            accumulate in float32 in both.
        check_finite: Look for NaN and infinity in what operations make, see `nonfinite`.

    Attributes:
        path: The package.
        precision: As given.
        functions: What each function takes and gives, by name.
        default_function: The one that runs when none is named.
        metadata: What the author wrote into the package.
        stages: The models of a pipeline, each an interpreter that also runs alone; empty if it is none.
        nonfinite: Of the last run: the operation that first made infinity and the one that first made NaN of
            inputs that held none, in the order in which they ran.

    Raises:
        BundleError: It is no package, damaged, or cannot be run; says which operation is why.
    """

    def __init__(
        self, package: Path | str | Package, precision: Precision = "exact", *, check_finite: bool = True
    ) -> None:
        if precision not in ("exact", "device"):
            raise InputError(f"precision is {precision!r}, expected 'exact' or 'device'")
        opened = package if isinstance(package, Package) else open_package(Path(package))
        self.path = opened.path
        self.precision = precision
        self.metadata = metadata(opened)
        self.nonfinite: tuple[NonFinite, ...] = ()
        self._spec = opened.spec
        self._check_finite = check_finite
        self._weights = Weights(precision == "device")
        self._plans: dict[str, Plan] = {}
        self.stages = tuple(
            _stage(i, stage, precision, check_finite) for i, stage in enumerate(opened.stages())
        )
        self.functions: dict[str, FunctionSpec]
        self.default_function: str = DEFAULT_FUNCTION
        if self.stages:
            taken = [stage.functions[stage.default_function] for stage in self.stages]
            self.functions = {DEFAULT_FUNCTION: describe_pipeline(opened, taken)}
        else:
            self.functions = describe_functions(opened)
            self.default_function = default_function(opened)
            self._plans = {
                name: plan_function(opened, spec, precision) for name, spec in self.functions.items()
            }

    @property
    def decoded_bytes(self) -> int:
        """Memory that the weights decoded so far take."""
        return self._weights.nbytes + sum(stage.decoded_bytes for stage in self.stages)

    def get_spec(self) -> Any:  # noqa: ANN401  protobuf's classes have no types
        """A copy of the package's protobuf `Model`."""
        copy = type(self._spec)()
        copy.CopyFrom(self._spec)
        return copy

    def make_state(self, function: str | None = None) -> State:
        """A new state for a function, and for all others with the same states; empty if it has none.

        Raises:
            InputError: There is no such function.
            BundleError: A state has no fixed shape, or there is no memory for it.
        """
        return State(self._function(function).states)

    @overload
    def predict(
        self,
        inputs: Inputs,
        state: State | None = None,
        function: str | None = None,
        on_op: OnOp | None = None,
    ) -> dict[str, Any]: ...

    @overload
    def predict(
        self,
        inputs: list[Inputs],
        state: None = None,
        function: str | None = None,
        on_op: OnOp | None = None,
    ) -> list[dict[str, Any]]: ...

    def predict(
        self,
        inputs: Inputs | list[Inputs],
        state: State | None = None,
        function: str | None = None,
        on_op: OnOp | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Run a function.

        Args:
            inputs: By name arrays, torch tensors, numbers or nested lists; for image inputs also pictures
                (`PIL.Image`) and uint8 arrays [height, width, 3] or [height, width]. Pixels are 0 to 255:
                scale and bias are in the program. A list of such dicts is run one by one.
            state: What persists between calls; changed by the run. Needed if the function has states.
            function: Which one; the default one if None.
            on_op: Called with what each operation gave.

        Returns:
            Outputs by name: arrays, a picture for an image output, a label and probabilities by label for a
            classifier. Floats are float32 in `exact`, and of their declared type in `device`; integers are of
            their declared type. A list of them for a list.

        Raises:
            InputError: There is no such function, or it takes other inputs or another state.
            BundleError: An operation cannot be computed; says which one. A state may be half updated then.
        """
        spec = self._function(function)
        if not isinstance(inputs, list):
            outputs, self.nonfinite = self._run(spec, inputs, state, on_op, None)
            return outputs
        if state is not None:
            raise InputError("a list of inputs cannot be run with a state", hint="run them one by one")
        runs = [self._run(spec, one, None, on_op, None) for one in inputs]
        self.nonfinite = tuple(found for _, several in runs for found in several)
        return [outputs for outputs, _ in runs]

    def _run(
        self, spec: FunctionSpec, inputs: Inputs, state: State | None, on_op: OnOp | None, stage: int | None
    ) -> tuple[dict[str, Value], tuple[NonFinite, ...]]:
        if self.stages:
            return self._run_pipeline(spec, inputs, state, on_op)
        try:
            return self._run_program(self._plans[spec.name], inputs, state, on_op, stage)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            raise BundleError(f"there is not enough memory to run function '{spec.name[:80]}'") from error

    def _run_pipeline(
        self, spec: FunctionSpec, inputs: Inputs, state: State | None, on_op: OnOp | None
    ) -> tuple[dict[str, Value], tuple[NonFinite, ...]]:
        """Each stage takes inputs of the pipeline and what earlier stages gave, by name."""
        if state is not None and state.specs:
            raise InputError("a pipeline has no states")
        check_names(spec, inputs)
        values = dict(inputs)
        found: tuple[NonFinite, ...] = ()
        for i, stage in enumerate(self.stages):
            taken = stage.functions[stage.default_function]
            given = {v.name: values[v.name] for v in taken.inputs if v.name in values}
            try:
                outputs, nonfinite = stage._run(taken, given, None, on_op, i)
            except BundleError as error:
                raise _in_stage(i, error) from error
            values |= outputs
            found += nonfinite
        return {v.name: values[v.name] for v in spec.outputs}, found

    @torch.inference_mode()
    def _run_program(
        self, plan: Plan, inputs: Inputs, state: State | None, on_op: OnOp | None, stage: int | None
    ) -> tuple[dict[str, Value], tuple[NonFinite, ...]]:
        self._check_memory(plan)
        tensors = prepare_inputs(plan.spec, inputs, self.precision == "device")
        watch = Watch(plan.spec.name, self._check_finite, on_op, stage)
        frame = Frame(
            [None] * plan.num_slots,
            self._states(plan, state),
            self._weights,
            watch.observe if watch.needed else None,
        )
        for slot, tensor in zip(plan.block.inputs, tensors, strict=True):
            frame.values[slot] = tensor
        plan.block.run(frame)
        outputs: dict[str, Value] = {}
        for spec, ref, value in zip(
            plan.spec.outputs, plan.block.outputs, plan.block.results(frame), strict=True
        ):
            shared = isinstance(value, torch.Tensor) and (isinstance(ref, Constant) or ref in plan.copied)
            outputs[spec.name] = handed_out(
                spec, value.clone() if shared else value, self.precision == "exact"
            )
        return outputs, tuple(watch.found)

    def _check_memory(self, plan: Plan) -> None:
        have = machine_bytes()
        if plan.needed_bytes > have:
            raise BundleError(
                f"function '{plan.spec.name[:80]}' takes {plan.needed_bytes / 1e9:.1f} GB of memory, "
                f"this machine has {have / 1e9:.1f} GB",
                where=self.path,
            )

    def _function(self, name: str | None) -> FunctionSpec:
        wanted = self.default_function if name is None else name
        if wanted not in self.functions:
            raise InputError(
                f"there is no function '{wanted}'; there are {', '.join(self.functions)}", where=self.path
            )
        return self.functions[wanted]

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

    def __repr__(self) -> str:
        """The package, and what each function takes and gives."""
        lines = [f"Interpreter('{self.path}', precision='{self.precision}')"]
        for name, spec in self.functions.items():
            is_default = name == self.default_function and len(self.functions) > 1
            lines.append(f"  {spec}{' (default)' if is_default else ''}")
        lines += [
            f"  stage {i}: {stage.functions[stage.default_function]}" for i, stage in enumerate(self.stages)
        ]
        return "\n".join(lines)


def _stage(number: int, package: Package, precision: Precision, check_finite: bool) -> Interpreter:
    try:
        return Interpreter(package, precision, check_finite=check_finite)
    except BundleError as error:
        raise _in_stage(number, error) from error


def _in_stage(number: int, error: BundleError) -> BundleError:
    return BundleError(f"stage {number} of the pipeline: {error}", hint=error.hint)
