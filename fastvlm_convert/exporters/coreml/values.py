"""Values of a program, and the dtypes and shapes that operations give: those that coremltools infers.

`proto` compares every value with what coremltools makes of the same operation, so a rule that is wrong here
fails the first export that needs it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fastvlm_convert.arithmetic import num_elements

FLEXIBLE: Final = -1  # a dimension that a call decides

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """What an operation gives, or a function is given.

    Attributes:
        name: Unique name in a graph.
        dtype: Of its elements.
        shape: Dimensions; `FLEXIBLE` where a call decides.
    """

    name: str
    dtype: str
    shape: Shape


def literal(value: Any) -> np.ndarray:  # noqa: ANN401
    """A literal among the inputs of an operation, with the dtype in which coremltools stores it."""
    array = np.asarray(value)
    return array.astype(np.int32) if array.dtype == np.int64 else array


def results(kind: str, name: str, inputs: Mapping[str, Any]) -> tuple[Value, ...]:
    """The values that an operation gives.

    Args:
        kind: Operator of the MIL builder.
        name: Name of the operation. A single value has it too, several have it with a number.
        inputs: Values and literals by parameter.
    """
    if kind == "split":
        parts = _split_shapes(**inputs)
        return tuple(Value(f"{name}_{i}", inputs["x"].dtype, shape) for i, shape in enumerate(parts))
    dtype, shape = _RULES[kind](inputs)
    return (Value(name, dtype, shape),)


Rule = Callable[[Mapping[str, Any]], tuple[str, Shape]]


def _like(parameter: str) -> Rule:
    """A result with the dtype and shape of an input."""
    return lambda inputs: (inputs[parameter].dtype, inputs[parameter].shape)


def _broadcast(*parameters: str, dtype: str = "") -> Rule:
    def rule(inputs: Mapping[str, Any]) -> tuple[str, Shape]:
        shape: Shape = ()
        for parameter in parameters:
            shape = broadcast(shape, _shape_of(inputs[parameter]))
        return dtype or _dtype_of(inputs[parameters[-1]]), shape

    return rule


def broadcast(a: Shape, b: Shape) -> Shape:
    """The shape of an element-wise result. A known dimension decides over one that a call decides."""
    rank = max(len(a), len(b))
    pairs = zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
    return tuple(max(pair) if 1 not in pair else (pair[1] if pair[0] == 1 else pair[0]) for pair in pairs)


def _shape_of(x: Any) -> Shape:  # noqa: ANN401
    return x.shape if isinstance(x, Value) else literal(x).shape


def _dtype_of(x: Any) -> str:  # noqa: ANN401
    return x.dtype if isinstance(x, Value) else literal(x).dtype.name


_FLOATS: Final = {"fp16": "float16", "fp32": "float32"}


def _cast(inputs: Mapping[str, Any]) -> tuple[str, Shape]:
    return _FLOATS[inputs["dtype"]], inputs["x"].shape


def _concat(inputs: Mapping[str, Any]) -> tuple[str, Shape]:
    values, axis = inputs["values"], inputs["axis"]
    shapes = [_shape_of(value) for value in values]
    sizes = [shape[axis] for shape in shapes]
    size = FLEXIBLE if FLEXIBLE in sizes else sum(sizes)
    return _dtype_of(values[0]), _replaced(shapes[0], axis, size)


def _const(inputs: Mapping[str, Any]) -> tuple[str, Shape]:
    return inputs["val"].dtype, inputs["val"].shape


def _conv(inputs: Mapping[str, Any]) -> tuple[str, Shape]:
    x, kernel = inputs["x"], inputs["weight"].shape[2:]
    before, after = inputs["pad"][0::2], inputs["pad"][1::2]
    edges = [
        (n + a + b - k) // stride + 1
        for n, a, b, k, stride in zip(x.shape[2:], before, after, kernel, inputs["strides"], strict=True)
    ]
    return x.dtype, (x.shape[0], inputs["weight"].shape[0], *edges)


def _gather(inputs: Mapping[str, Any]) -> tuple[str, Shape]:
    return inputs["x"].dtype, (*inputs["indices"].shape, *inputs["x"].shape[1:])


def _linear(inputs: Mapping[str, Any]) -> tuple[str, Shape]:
    return inputs["x"].dtype, (*inputs["x"].shape[:-1], inputs["weight"].shape[0])


def _matmul(inputs: Mapping[str, Any]) -> tuple[str, Shape]:
    x, y = inputs["x"], inputs["y"]
    columns = y.shape[-2] if inputs["transpose_y"] else y.shape[-1]
    return x.dtype, (*broadcast(x.shape[:-2], y.shape[:-2]), x.shape[-2], columns)


def _attention(inputs: Mapping[str, Any]) -> tuple[str, Shape]:
    return inputs["query"].dtype, (*inputs["query"].shape[:-1], inputs["value"].shape[-1])


def _reduced(inputs: Mapping[str, Any]) -> tuple[str, Shape]:
    shape = inputs["x"].shape
    for axis in inputs["axes"]:
        shape = _replaced(shape, axis, 1)
    return inputs["x"].dtype, shape


def _reshape(inputs: Mapping[str, Any]) -> tuple[str, Shape]:
    x, shape = inputs["x"], tuple(inputs["shape"])
    if FLEXIBLE in shape and FLEXIBLE not in x.shape:
        known = num_elements([n for n in shape if n != FLEXIBLE])
        shape = _replaced(shape, shape.index(FLEXIBLE), num_elements(x.shape) // known)
    return x.dtype, shape


def _slice_by_index(inputs: Mapping[str, Any]) -> tuple[str, Shape]:
    """Where begin or end comes from a call, only dimensions of one are known."""
    return inputs["x"].dtype, tuple(1 if n == 1 else FLEXIBLE for n in inputs["x"].shape)


def _split_shapes(x: Value, axis: int, num_splits: int = 0, split_sizes: Sequence[int] = ()) -> list[Shape]:
    sizes = split_sizes or [x.shape[axis] // num_splits] * num_splits
    return [_replaced(x.shape, axis, size) for size in sizes]


def _replaced(shape: Shape, axis: int, size: int) -> Shape:
    changed = list(shape)
    changed[axis] = size
    return tuple(changed)


_RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(("abs", "gelu", "identity", "layer_norm", "relu", "rsqrt"), _like("x")),
    **dict.fromkeys(("sigmoid", "silu", "slice_update", "softmax", "square"), _like("x")),
    **dict.fromkeys(("add", "maximum", "minimum", "mul", "real_div"), _broadcast("x", "y")),
    **dict.fromkeys(("reduce_max", "reduce_mean"), _reduced),
    "cast": _cast,
    "concat": _concat,
    "const": _const,
    "constexpr_cast": lambda inputs: (_FLOATS[inputs["output_dtype"]], inputs["source_val"].shape),
    "constexpr_blockwise_shift_scale": lambda inputs: (inputs["scale"].dtype, inputs["data"].shape),
    "constexpr_lut_to_dense": lambda inputs: (inputs["lut"].dtype, inputs["indices"].shape),
    "conv": _conv,
    "coreml_update_state": _like("value"),
    "dequantize": lambda inputs: (inputs["scale"].dtype.name, inputs["input"].shape),
    "gather": _gather,
    "less_equal": _broadcast("x", "y", dtype="bool"),
    "linear": _linear,
    "matmul": _matmul,
    "quantize": lambda inputs: (inputs["output_dtype"], inputs["input"].shape),
    "read_state": _like("input"),
    "reshape": _reshape,
    "scaled_dot_product_attention": _attention,
    "select": _broadcast("cond", "a", "b"),
    "shape": lambda inputs: ("int32", (len(inputs["x"].shape),)),
    "slice_by_index": _slice_by_index,
    "slice_by_size": lambda inputs: (inputs["x"].dtype, tuple(inputs["size"])),
    "transpose": lambda inputs: (inputs["x"].dtype, tuple(inputs["x"].shape[i] for i in inputs["perm"])),
}
