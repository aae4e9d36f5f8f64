"""The work of a function of a Core ML package, by walking its program; weights stay on disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fastvlm_convert.arithmetic import ceil_div, num_elements
from fastvlm_convert.errors import BundleError
from fastvlm_convert.estimate.mil_shapes import MULTIPLIES, Operand, joined_numbers, macs_of, resolved
from fastvlm_convert.estimate.work import Work, most_alive
from fastvlm_convert.io_names import KEY_CACHE, VALUE_CACHE
from fastvlm_convert.mil.description import describe_functions, function_block
from fastvlm_convert.mil.package import Package, open_package
from fastvlm_convert.mil.types import Message, tensor_type

_CACHES: Final = frozenset({KEY_CACHE, VALUE_CACHE})
_VIEWS: Final = frozenset({"reshape", "expand_dims", "squeeze"})
_LOOK_UPS: Final = frozenset({"gather", "slice_by_size", "slice_by_index"})
_SETTINGS: Final = frozenset(
    {"ints", "longInts", "bools"}
)  # shapes, axes and flags that stand in the program
_STATES: Final = frozenset({"read_state", "write_state"})
# They multiply too, or run others; our programs have none of them.
_UNKNOWN: Final = frozenset(
    {"einsum", "conv_transpose", "conv_quantized", "gru", "lstm", "rnn", "cond", "while_loop"}
)
_HINT: Final = "`fastvlm-convert mil` lists what is in the package"
_CONTRADICTIONS: Final = (ValueError, LookupError, TypeError, ZeroDivisionError)


def mil_work(path: Path, function: str, tokens: int) -> Work:
    """What a call of a function does.

    Args:
        path: The package.
        function: The function's name.
        tokens: What a dimension that the program leaves open is.

    Raises:
        BundleError: It is no package, has no such function, contradicts itself, or has an operation that is
            not known here.
    """
    package = open_package(path)
    spec = describe_functions(package).get(function)
    if spec is None:
        raise BundleError(f"the program has no function '{function}'", where=path, hint=_HINT)
    walk = _Walk(package, tokens)
    for value in (*spec.inputs, *spec.states):
        shape = tuple(tokens if n is None else n for n in value.shape)
        walk.define(value.name, Operand(shape, value.type.element.bits), is_cache=value.name in _CACHES)
    block = function_block(package, function)
    for operation in block.operations:
        walk.step(operation)
    return walk.work(list(block.outputs))


def chunk_of(path: Path, function: str, name: str) -> tuple[int, bool]:
    """The most tokens that a call takes, and whether it takes fewer as well.

    Args:
        path: The package.
        function: The function's name.
        name: Its input of shape [1, tokens, ...].

    Raises:
        BundleError: It has no such function or input.
    """
    spec = describe_functions(open_package(path)).get(function)
    given = None if spec is None else next((v for v in spec.inputs if v.name == name), None)
    if given is None or len(given.shape) < 2:
        raise BundleError(f"the program has no function '{function}' with an input '{name}'", where=path)
    flexible = given.flexibility
    if flexible is None:
        return given.shape[1] or 1, False
    most = [shape[1] for shape in flexible.shapes] + [high or low for low, high in flexible.ranges[1:2]]
    return max(most), True


class _Walk:
    """Follows shapes through a program and adds up what its operations do."""

    def __init__(self, package: Package, tokens: int) -> None:
        self._package = package
        self._tokens = tokens
        self._values: dict[str, Operand] = {}
        self._sizes: dict[object, int] = {}  # bytes of stored arrays, by where they lie
        self._cached: set[str] = set()  # states, and what is the same memory
        self._roots: dict[str, str] = {}
        self._whole: set[object] = set()
        self._rows: dict[object, int] = {}  # bytes of the rows that are looked up, by table
        self._cache_bytes = self._macs = 0
        self._writes: list[tuple[str, int, tuple[str, ...]]] = []

    def define(self, name: str, value: Operand, is_cache: bool = False) -> None:
        """Take an input or a state."""
        self._values[name] = value
        if is_cache:
            self._cached.add(name)

    def step(self, operation: Message) -> None:
        """Take an operation."""
        name = operation.outputs[0].name if operation.outputs else operation.type
        what = f"operation '{name[:80]}'"
        if operation.type in _UNKNOWN:
            raise self._error(f"{what} is of the type {operation.type}, which the estimate does not know")
        try:
            if operation.type == "const":
                self._constant(name, operation)
            else:
                self._operation(operation, what)
        except _CONTRADICTIONS as error:
            raise self._error(f"{what} does not fit its inputs: {str(error)[:120]}") from error

    def _constant(self, name: str, operation: Message) -> None:
        value = operation.attributes["val"]
        self._values[name] = self._stored(value, name)

    def _stored(self, value: Message, name: str) -> Operand:
        """A value that stands in the program or in a weight file."""
        declared = tensor_type(value.type, f"constant '{name[:80]}'")
        if declared is None or declared.fixed_shape is None:
            return Operand((), 0)
        shape, bits = declared.fixed_shape, declared.element.bits
        size = ceil_div(num_elements(shape) * bits, 8)
        if value.WhichOneof("value") == "blobFileValue":
            place: object = (value.blobFileValue.fileName, value.blobFileValue.offset)
            self._sizes[place] = size
            return Operand(shape, bits, None, frozenset({place}))
        tensor = value.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        if kind in _SETTINGS:
            return Operand(shape, bits, tuple(getattr(tensor, kind).values))
        self._sizes[name] = size
        return Operand(shape, bits, None, frozenset({name}))

    def _operation(self, operation: Message, what: str) -> None:
        operands = dict(self._operands(operation))
        stored = list(operands.values())
        stored += [
            (self._stored(value, f"{what}, {key}"),)
            for key, value in operation.attributes.items()
            if operation.type.startswith("constexpr_") and key != "name"
        ]
        sources = frozenset(place for group in stored for operand in group for place in operand.weights)
        outputs: list[tuple[str, Operand]] = []
        for output in operation.outputs:
            declared = tensor_type(output.type, what)
            if declared is None:
                raise ValueError("its result is no tensor")
            shape = resolved(operation.type, declared.shape, operands, self._tokens)
            numbers = joined_numbers(operands) if operation.type == "concat" else None
            outputs.append((output.name, Operand(shape, declared.element.bits, numbers)))
        if sources and all(operand.is_stored for group in stored for operand in group):
            for name, value in outputs:
                self._values[name] = Operand(value.shape, value.bits, None, sources)
            return
        self._values.update(outputs)
        arguments = [a for given in operation.inputs.values() for a in given.arguments]
        names = [a.name for a in arguments if a.WhichOneof("binding") == "name"]
        touches_cache = any(name in self._cached for name in names)
        if touches_cache and self._cache_step(operation, operands, outputs):
            return
        self._count(operation.type, operands, outputs, sources, names)

    def _operands(self, operation: Message) -> Iterator[tuple[str, tuple[Operand, ...]]]:
        for key, given in operation.inputs.items():
            yield (
                key,
                tuple(
                    self._values[a.name] if a.WhichOneof("binding") == "name" else self._stored(a.value, key)
                    for a in given.arguments
                ),
            )

    def _cache_step(
        self, operation: Message, operands: dict[str, tuple[Operand, ...]], outputs: list[tuple[str, Operand]]
    ) -> bool:
        """Count an operation on the cache where it moves keys and values and does nothing else."""
        if operation.type == "slice_update":
            self._cache_bytes += operands["update"][0].num_bytes
        elif operation.type in _LOOK_UPS:
            self._cache_bytes += sum(value.num_bytes for _, value in outputs)
        elif operation.type not in _STATES:
            return False
        if operation.type in ("slice_update", "read_state"):
            self._cached |= {name for name, _ in outputs}
        return True

    def _count(
        self,
        kind: str,
        operands: dict[str, tuple[Operand, ...]],
        outputs: list[tuple[str, Operand]],
        sources: frozenset[object],
        names: list[str],
    ) -> None:
        if kind in MULTIPLIES:
            self._macs += macs_of(kind, operands, outputs[0][1].shape)
        table = operands["x"][0] if kind in _LOOK_UPS else None
        if table is not None and table.weights:
            share = num_elements(outputs[0][1].shape), num_elements(table.shape)
            for place in table.weights:
                size = self._sizes[place] * share[0] // share[1]
                self._rows[place] = max(size, self._rows.get(place, 0))
            sources -= table.weights
        self._whole |= sources
        reads = tuple(self._roots.get(name, name) for name in names)
        for name, value in outputs:
            if kind in _VIEWS and reads:
                self._roots[name] = reads[0]
            else:
                self._writes.append((name, value.num_bytes, reads))

    def work(self, outputs: list[str]) -> Work:
        """What all operations so far do together; a cache that goes in and out is written whole."""
        written = sum(self._values[name].num_bytes for name in outputs if name in self._cached)
        return Work(
            self._macs,
            sum(self._sizes[place] for place in self._whole),
            sum(self._rows.values()),
            self._cache_bytes + written,
            sum(size for _, size, _ in self._writes),
            most_alive(self._writes, {}),
        )

    def _error(self, problem: str) -> BundleError:
        return BundleError(problem, where=self._package.path, hint=_HINT)
