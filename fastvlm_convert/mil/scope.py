"""What the operations of a function may read while it is planned: names become slots or constants."""

from dataclasses import dataclass, field
from typing import Any

import torch

from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil.constants import Constant, constant_of
from fastvlm_convert.mil.ops.table import Kind, List, held_dtype
from fastvlm_convert.mil.package import Package
from fastvlm_convert.mil.readers import read_constant
from fastvlm_convert.mil.steps import Output
from fastvlm_convert.mil.types import FLOAT16, Message, TensorType, tensor_type


@dataclass(frozen=True)
class StateRef:
    """A state; only `read_state` and `write_state` take one."""

    name: str


Ref = int | Constant | StateRef


@dataclass
class FunctionPlan:
    """What all blocks of a function share while it is planned.

    Attributes:
        package: Holds program and weights.
        name: The function.
        rounds: Whether results that are declared as float16 are rounded to it.
        half_states: States that are stored as float16.
        num_slots: Slots given out so far.
        num_operations: Operations planned so far.
        constants: Bytes of the decoded constants that are read, by their keys.
    """

    package: Package
    name: str
    rounds: bool
    half_states: frozenset[str]
    num_slots: int = 0
    num_operations: int = 0
    constants: dict[Any, int] = field(default_factory=dict)

    def error(self, what: str) -> BundleError:
        """The error for a function that cannot be planned."""
        return BundleError(
            f"{what}, in function '{self.name[:80]}'",
            where=self.package.path,
            hint="the program is damaged or was edited; convert or export it again",
        )

    def slot(self) -> int:
        """A new slot."""
        self.num_slots += 1
        return self.num_slots - 1


@dataclass
class Scope:
    """The values that the operations of a block may read.

    Attributes:
        function: What the block is part of.
        names: What each name means.
    """

    function: FunctionPlan
    names: dict[str, Ref] = field(default_factory=dict)

    def inner(self) -> "Scope":
        """The scope of a block inside of this one: what it defines is not seen outside."""
        return Scope(self.function, dict(self.names))

    def define(self, name: str, ref: Ref, what: str) -> None:
        """Give a name its meaning.

        Raises:
            BundleError: It has one already.
        """
        if name in self.names:
            raise self.function.error(f"{what} defines '{name[:80]}' a second time")
        self.names[name] = ref

    def define_slot(self, name: str, what: str) -> int:
        """Give a name a new slot."""
        slot = self.function.slot()
        self.define(name, slot, what)
        return slot

    def look_up(self, name: str, what: str) -> Ref:
        """What a name means.

        Raises:
            BundleError: No operation before defines it.
        """
        if name not in self.names:
            raise self.function.error(f"{what} reads '{name[:80]}', which no operation before it makes")
        return self.names[name]

    def value(self, ref: Ref, what: str) -> int | Constant:
        """A slot or a constant that is needed when the function runs.

        Raises:
            BundleError: It is a state.
        """
        if isinstance(ref, StateRef):
            raise self.function.error(f"{what} takes a value, not the state '{ref.name[:80]}'; read it first")
        if isinstance(ref, Constant):
            self.function.constants[ref.key] = ref.decoded_bytes
        return ref


@dataclass(frozen=True)
class Site:
    """One operation while it is planned.

    Attributes:
        message: Its protobuf.
        scope: What it may read; takes what it makes.
        name: Name of its first result.
        what: What it is, for messages.
        arguments: Its inputs.
    """

    message: Message
    scope: Scope
    name: str
    what: str
    arguments: dict[str, list[Ref]]

    @classmethod
    def of(cls, message: Message, scope: Scope) -> "Site":
        """An operation with its inputs looked up.

        Raises:
            BundleError: It reads what no operation before it makes.
        """
        name = message.outputs[0].name if message.outputs else _named(message)
        what = f"operation '{name[:80]}' ({message.type[:40]})"
        arguments = {
            key: [_argument(a, scope, f"{what}, input '{key[:40]}'") for a in argument.arguments]
            for key, argument in message.inputs.items()
        }
        return cls(message, scope, name, what, arguments)

    def error(self, what: str) -> BundleError:
        """The error for this operation; the text goes on after its name."""
        return self.scope.function.error(f"{self.what} {what}")

    def types(self) -> list[TensorType | None]:
        """The declared types of its results; None for what is no tensor."""
        return [tensor_type(o.type, self.what) for o in self.message.outputs]

    def output(self, number: int, *, moves: bool, plain: bool = False) -> Output:
        """Define a result.

        Args:
            number: Which one.
            moves: Whether the operation only moves values, so that nothing is rounded.
            plain: Whether it is a Python value instead of a tensor.
        """
        message = self.message.outputs[number]
        slot = self.scope.define_slot(message.name, self.what)
        declared = tensor_type(message.type, self.what)
        if plain:
            return Output(slot, message.name)
        if declared is None or not declared.element.bits:
            is_list = message.type.WhichOneof("type") == "listType"
            return Output(slot, message.name, List if is_list else object)
        rounds = self.scope.function.rounds and declared.element is FLOAT16 and not moves
        dtype = held_dtype(declared.element)
        return Output(slot, message.name, torch.Tensor, dtype, declared.fixed_shape, rounds)

    def plain(self, refs: list[Ref], kind: Kind, key: str) -> Any:  # noqa: ANN401
        """An input that is given as several constants, each a part of one plain value."""
        place = f"{self.what}, input '{key}'"
        found: tuple[Any, ...] = ()
        for ref in refs:
            if not isinstance(ref, Constant):
                raise self.scope.function.error(f"{place} takes constants")
            part = read_constant(ref, kind, place)
            if not isinstance(part, tuple) or len(part) != 1:
                raise self.scope.function.error(f"{place} takes single values")
            found += part
        return found


def _argument(binding: Message, scope: Scope, what: str) -> Ref:
    if binding.WhichOneof("binding") == "value":
        return constant_of(scope.function.package, binding.value, what)
    return scope.look_up(binding.name, what)


def _named(operation: Message) -> str:
    """Name of an operation without results: its attribute."""
    value = operation.attributes.get("name")
    texts = list(value.immediateValue.tensor.strings.values) if value is not None else []
    return texts[0] if texts else "without a name"
