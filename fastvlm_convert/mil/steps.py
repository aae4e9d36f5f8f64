"""Steps of a plan: what is done with the values of one run."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.constants import Constant, Weights
from fastvlm_convert.mil.ops.table import List
from fastvlm_convert.mil.readers import UnreadableError
from fastvlm_convert.mil.types import shape_text

Reader = Callable[[torch.Tensor], Any]

# What torch, numpy and Python raise for inputs that an operation cannot take.
_REFUSALS: Final = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, MemoryError,
)  # fmt: skip
_INNER_WORDS: Final = re.compile(r"index out of range$|values to unpack|zip\(\) argument|not implemented for")
# Far above any sequence; a loop that goes on is taken for endless.
MAX_ITERATIONS: Final = 20_000
MAX_ITERATIONS_OF_A_RUN: Final = 100_000  # loops inside of loops multiply


@dataclass(frozen=True)
class Output:
    """A result of a step.

    Attributes:
        slot: Where it is put.
        name: What the program calls it.
        holds: Class of the result: a tensor, a list, or any.
        dtype: Type of the tensor; None if it is not declared.
        shape: Its declared shape, or None if it is known only when it runs.
        rounds: Whether it is rounded to float16.
    """

    slot: int
    name: str
    holds: type = object
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] | None = None
    rounds: bool = False


@dataclass
class Frame:
    """One run.

    Attributes:
        values: The value of every slot.
        states: The states' tensors by name.
        weights: Decoded constants.
        observe: Called after every operation with the step, what it took and what it gave; or None.
        iterations: How many more all loops together may make.
    """

    values: list[Any]
    states: dict[str, torch.Tensor]
    weights: Weights
    observe: Callable[["Step", dict[str, Any], list[Any]], None] | None
    iterations: int = MAX_ITERATIONS_OF_A_RUN


class Step(Protocol):
    """One operation of a function.

    Attributes:
        name: Name of its first result.
        type: The operation.
        moves: Whether it only moves values.
        outputs: Its results.
        reads: Slots it reads.
        frees: Slots that nothing reads afterwards.
    """

    name: str
    type: str
    moves: bool
    outputs: tuple[Output, ...]
    reads: tuple[int, ...]
    frees: tuple[int, ...]

    def run(self, frame: Frame) -> None:
        """Compute it."""
        ...


@dataclass
class Block:
    """A list of steps: a function, or a branch or loop inside of one.

    Attributes:
        inputs: Slots that are set before it runs.
        steps: In the order in which they run.
        outputs: Slots or constants that it gives.
    """

    inputs: tuple[int, ...]
    steps: list[Step]
    outputs: tuple[int | Constant, ...]

    def run(self, frame: Frame) -> None:
        """Run all steps."""
        values = frame.values
        for step in self.steps:
            step.run(frame)
            for slot in step.frees:
                values[slot] = None

    def results(self, frame: Frame) -> list[Any]:
        """The values of the outputs."""
        return [frame.weights.tensor(o) if isinstance(o, Constant) else frame.values[o] for o in self.outputs]


@dataclass
class CallStep:
    """An operation of the table.

    Attributes:
        function: Computes it.
        fixed: Inputs that are the same in every run.
        dynamic: Input, slot, and what turns a tensor into a plain value, if that is needed.
        lists: Inputs of several tensors, each a slot or a constant.
        pending: Inputs that are constants not decoded yet.
        place: The function's name, for messages.
        rounds_update: Whether the input `update` is rounded to float16 because it is stored in a state.
    """

    name: str
    type: str
    moves: bool
    function: Callable[..., Any]
    fixed: dict[str, Any]
    dynamic: tuple[tuple[str, int, Reader | None], ...]
    lists: tuple[tuple[str, tuple[int | Constant, ...]], ...]
    pending: list[tuple[str, Constant]]
    outputs: tuple[Output, ...]
    reads: tuple[int, ...]
    place: str
    reads_constant: bool = False
    frees: tuple[int, ...] = ()
    rounds_update: bool = False

    def run(self, frame: Frame) -> None:
        """Compute it and put the results into their slots."""
        values = frame.values
        given: dict[str, Any] = {}
        name = ""
        try:
            if self.pending:
                self._bind(frame.weights)
            given = self.fixed.copy()
            for name, slot, reader in self.dynamic:
                given[name] = values[slot] if reader is None else reader(values[slot])
            for name, items in self.lists:
                given[name] = [
                    frame.weights.tensor(i) if isinstance(i, Constant) else values[i] for i in items
                ]
            if self.rounds_update:
                made = self.function(**{**given, "update": round_half(given["update"])})
            else:
                made = self.function(**given)
        except UnreadableError as error:
            raise refusal(self, f"its input '{name}' {error}") from error
        except _REFUSALS as error:
            raise refusal(self, _why(error, given)) from error
        results = made if isinstance(made, tuple) else (made,)
        if len(results) < len(self.outputs):
            raise refusal(self, f"it gives {len(results)} results, the program declares {len(self.outputs)}")
        found = []
        for output, result in zip(self.outputs, results, strict=False):  # some systems drop the last ones
            kept = result
            if (
                type(result) is not torch.Tensor
                or result.dtype is not output.dtype
                or result.shape != output.shape
            ):
                kept = checked(self, result, output)
            if output.rounds:
                kept = round_half(kept)
            values[output.slot] = kept
            found.append(kept)
        if frame.observe is not None:
            frame.observe(self, given, found)

    def _bind(self, weights: Weights) -> None:
        while self.pending:
            name, constant = self.pending[-1]
            self.fixed[name] = weights.tensor(constant)
            self.pending.pop()


@dataclass
class ReadStep:
    """Reading a state: the result is the state's own tensor."""

    name: str
    state: str
    outputs: tuple[Output, ...]
    type: str = "read_state"
    moves: bool = True
    reads: tuple[int, ...] = ()
    frees: tuple[int, ...] = ()

    def run(self, frame: Frame) -> None:
        """Put the state's tensor into the slot."""
        frame.values[self.outputs[0].slot] = frame.states[self.state]


@dataclass
class WriteStep:
    """Writing a state: the tensor becomes the state's own.

    Attributes:
        state: The state's name.
        data: Slot or constant of its new value.
        rounds: Whether the value is rounded to float16 because the state is stored so.
        copies: Whether the tensor may be needed elsewhere and must not be changed by later updates.
    """

    name: str
    state: str
    data: int | Constant
    rounds: bool
    place: str
    copies: bool = True
    outputs: tuple[Output, ...] = ()
    type: str = "write_state"
    moves: bool = True
    reads: tuple[int, ...] = ()
    frees: tuple[int, ...] = ()

    def run(self, frame: Frame) -> None:
        """Replace the state's tensor."""
        before = frame.states[self.state]
        data = frame.weights.tensor(self.data) if isinstance(self.data, Constant) else frame.values[self.data]
        if not isinstance(data, torch.Tensor):
            raise refusal(self, "the new value of the state is not a tensor")
        if data.shape != before.shape or data.dtype != before.dtype:
            raise refusal(self, f"the state has shape {list(before.shape)}, the new value {list(data.shape)}")
        if self.rounds:
            given, data = data, round_half(data)
            if frame.observe is not None:
                frame.observe(self, {"x": given}, [data])
        elif self.copies and data is not before:
            data = data.clone()
        frame.states[self.state] = data


@dataclass
class CondStep:
    """One of two blocks, chosen by a bool."""

    name: str
    predicate: int | Constant
    branches: tuple[Block, Block]
    outputs: tuple[Output, ...]
    reads: tuple[int, ...]
    place: str
    type: str = "cond"
    moves: bool = True
    frees: tuple[int, ...] = ()

    def run(self, frame: Frame) -> None:
        """Run the chosen block; its results are those of the step."""
        chosen = self.branches[0] if _truth(self, self.predicate, frame) else self.branches[1]
        chosen.run(frame)
        _hand_over(self, chosen.results(frame), frame)


@dataclass
class LoopStep:
    """A block that runs while another one says so."""

    name: str
    condition: Block
    body: Block
    first: tuple[int | Constant, ...]
    outputs: tuple[Output, ...]
    reads: tuple[int, ...]
    place: str
    type: str = "while_loop"
    moves: bool = True
    frees: tuple[int, ...] = ()

    def run(self, frame: Frame) -> None:
        """Run both blocks in turn; the last values of the loop's variables are the results."""
        loop = [frame.weights.tensor(f) if isinstance(f, Constant) else frame.values[f] for f in self.first]
        for _ in range(MAX_ITERATIONS):
            self._enter(self.condition, loop, frame)
            self.condition.run(frame)
            if not _truth(self, self.condition.outputs[0], frame):
                _hand_over(self, loop, frame)
                return
            self._enter(self.body, loop, frame)
            self.body.run(frame)
            loop = self.body.results(frame)
            frame.iterations -= 1
            if frame.iterations <= 0:
                raise refusal(
                    self, f"the loops of one run take more than {MAX_ITERATIONS_OF_A_RUN} iterations"
                )
        raise refusal(self, f"it did not end within {MAX_ITERATIONS} iterations")

    @staticmethod
    def _enter(block: Block, loop: list[Any], frame: Frame) -> None:
        for slot, value in zip(block.inputs, loop, strict=True):
            frame.values[slot] = value


def round_half(x: torch.Tensor) -> torch.Tensor:
    """Float32 rounded to what float16 can hold; beyond its range it becomes infinite."""
    return x.half().float()


def refusal(step: Any, why: str) -> BundleError:  # noqa: ANN401  any step
    """The error for an operation that cannot be computed."""
    first = " ".join(why.split())[:300]
    return BundleError(
        f"operation '{step.name[:80]}' ({step.type[:40]}) of function '{step.place[:80]}' cannot run: {first}"
    )


def checked(step: Any, result: Any, output: Output) -> Any:  # noqa: ANN401
    """A result, refused if it is not what the program declares; only axes of size 1 may differ.

    Raises:
        BundleError: It has another type or shape.
    """
    fits = isinstance(result, output.holds)
    if not fits:
        wanted = "a list" if output.holds is List else "a tensor"
        raise refusal(step, f"'{output.name[:80]}' is {_text(result)}, the program declares {wanted}")
    if output.dtype is None:
        return result
    if result.dtype is not output.dtype:
        found, wanted = (str(d).removeprefix("torch.") for d in (result.dtype, output.dtype))
        raise refusal(step, f"'{output.name[:80]}' is {found}, the program declares {wanted}")
    if output.shape is None or result.shape == output.shape:
        return result
    if [n for n in result.shape if n != 1] != [n for n in output.shape if n != 1]:
        shapes = (shape_text(tuple(result.shape)), shape_text(output.shape))
        raise refusal(step, f"'{output.name[:80]}' is {shapes[0]}, the program declares {shapes[1]}")
    return result.reshape(output.shape)


def _why(error: Exception, given: dict[str, Any]) -> str:
    """What is wrong, in words of the program, not of Python or torch."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "there is not enough memory"
    if isinstance(error, TypeError | AttributeError | KeyError) or _INNER_WORDS.search(str(error)):
        tensors = ", ".join(
            f"'{k}' is {_text(v)}"
            for k, v in given.items()
            if isinstance(v, torch.Tensor | list | dict | str | tuple)
        )
        return f"it cannot take these inputs together: {tensors}"
    return str(error)


def _text(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {shape_text(tuple(value.shape))}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return "a dictionary" if isinstance(value, dict) else "text" if isinstance(value, str) else "a number"


def _truth(step: Any, ref: int | Constant, frame: Frame) -> bool:  # noqa: ANN401
    value = frame.weights.tensor(ref) if isinstance(ref, Constant) else frame.values[ref]
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.dtype is not torch.bool:
        raise refusal(step, "its condition is not one bool")
    return bool(value)


def _hand_over(step: Any, results: list[Any], frame: Frame) -> None:  # noqa: ANN401
    if len(results) != len(step.outputs):
        raise refusal(step, f"it gives {len(results)} results, the program declares {len(step.outputs)}")
    for output, result in zip(step.outputs, results, strict=True):
        frame.values[output.slot] = checked(step, result, output)
