"""What each operation gives: for whoever asked to see it, and to find where infinity and NaN begin."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch

from fastvlm_convert.mil.steps import CallStep, Step, round_half

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
        stage: Which stage of a pipeline it is in, from 0; None if there is no pipeline.
    """

    function: str
    name: str
    type: str
    outputs: dict[str, np.ndarray]
    stage: int | None = None


@dataclass(frozen=True)
class NonFinite:
    """The first operation that made infinity, or NaN, of inputs that held none.

    Attributes:
        function: The function it is in.
        name: Name of its first result.
        type: The operation.
        kind: What it made.
        count: In how many elements.
        stage: Which stage of a pipeline it is in, from 0; None if there is no pipeline.
    """

    function: str
    name: str
    type: str
    kind: Literal["inf", "nan"]
    count: int
    stage: int | None = None

    def __str__(self) -> str:
        """For reports."""
        place = f"'{self.function}'" + ("" if self.stage is None else f" of stage {self.stage}")
        return f"{self.count} x {self.kind} first made by '{self.name}' ({self.type}) in {place}"


OnOp = Callable[[OpResult], None]


class Watch:
    """Looks at what each operation of one run gives.

    Args:
        function: The function that runs.
        check: Whether to look for infinity and NaN.
        on_op: Called with what each operation gave.
        stage: Which stage of a pipeline runs.

    Attributes:
        found: The operations that first made infinity and NaN.
    """

    def __init__(self, function: str, check: bool, on_op: OnOp | None, stage: int | None) -> None:
        self.found: list[NonFinite] = []
        self.needed = check or on_op is not None
        self._function = function
        self._stage = stage
        self._open = {"inf", "nan"} if check else set()
        self._on_op = on_op

    def observe(self, step: Step, given: dict[str, Any], results: list[Any]) -> None:
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
            self._on_op(OpResult(self._function, step.name, step.type, arrays, self._stage))

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
                self.found.append(NonFinite(self._function, step.name, step.type, kind, count, self._stage))


def _is_finite(result: torch.Tensor) -> bool:
    """Whether all elements are; their sum tells with one pass and no copy."""
    return result.dtype is not torch.float32 or math.isfinite(result.sum().item())
