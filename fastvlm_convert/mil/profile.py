"""Where the time of a function goes, by kind of operation."""

import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Final

import numpy as np

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil import Interpreter, NonFinite, OpResult
from fastvlm_convert.mil.description import FunctionSpec, ValueSpec

_MAX_EXAMPLE: Final = 1 << 28  # elements


@dataclass(frozen=True)
class OpTime:
    """All operations of one kind.

    Attributes:
        type: The operation.
        count: How many ran.
        seconds: What they took together.
    """

    type: str
    count: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """One run of a function.

    Attributes:
        function: The function.
        seconds: The whole run.
        operations: The slowest kind first.
        nonfinite: What `Interpreter.nonfinite` said.
    """

    function: str
    seconds: float
    operations: tuple[OpTime, ...]
    nonfinite: tuple[NonFinite, ...]


def example_inputs(function: FunctionSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """Random floats from 0 to 1 (0 to 255 for images), and zeros for integers, which may be indices.

    Raises:
        BundleError: An input is too large to be made up.
    """
    rng = np.random.default_rng(seed)
    for spec in function.inputs:
        if math.prod(spec.example_shape) > _MAX_EXAMPLE:
            raise BundleError(f"input '{spec.name[:80]}', {spec}, is too large for an example")
    return {spec.name: _example(spec, rng) for spec in function.inputs}


def _example(spec: ValueSpec, rng: np.random.Generator) -> np.ndarray:
    shape = spec.example_shape
    if spec.color is not None:
        return rng.integers(0, 256, shape).astype(np.float32)
    if spec.type.element.is_float:
        return rng.random(shape, np.float32)
    return np.zeros(shape, spec.type.element.numpy)


def profile(interpreter: Interpreter, function: str) -> Profile:
    """Run a function twice on example inputs; the first run, which decodes the weights, does not count.

    Raises:
        BundleError: It cannot be run.
    """
    inputs = example_inputs(interpreter.functions[function])
    state = interpreter.make_state(function)
    interpreter.predict(inputs, state, function)
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    clock = [time.perf_counter()]

    def note(result: OpResult) -> None:
        now = time.perf_counter()
        total = totals[result.type]
        total[0] += 1
        total[1] += now - clock[0]
        clock[0] = time.perf_counter()

    start = clock[0] = time.perf_counter()
    interpreter.predict(inputs, state, function, on_op=note)
    seconds = time.perf_counter() - start
    kinds = sorted(totals.items(), key=lambda item: -item[1][1])
    times = tuple(OpTime(kind, int(count), spent) for kind, (count, spent) in kinds)
    return Profile(function, seconds, times, interpreter.nonfinite)
