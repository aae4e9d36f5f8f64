"""Shapes of what ONNX operations give, and how often they multiply: the operations of our graphs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fastvlm_convert.arithmetic import ceil_div, num_elements

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """What is known of a value before anything runs.

    Attributes:
        shape: Its dimensions.
        bits: Of an element.
        numbers: Its integers where they are known, flat: shapes, axes and indices.
        weights: The stored arrays that it is made of, and of nothing else; empty for what a call computes.
    """

    shape: Shape
    bits: int
    numbers: tuple[int, ...] | None = None
    weights: frozenset[str] = frozenset()

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return ceil_div(num_elements(self.shape) * self.bits, 8)


@dataclass(frozen=True)
class Result:
    """What an operation gives.

    Attributes:
        values: Its outputs; None for one that is left out or is the cache.
        macs: Multiply-accumulates.
        cache_bytes: Bytes of keys and values that it reads and writes.
        looked_up: Inputs of which it reads only some rows: which input, how many rows, of how many.
    """

    values: tuple[Value | None, ...]
    macs: int = 0
    cache_bytes: int = 0
    looked_up: tuple[tuple[int, int, int], ...] = ()


Inputs = Sequence[Value | None]
Attributes = Mapping[str, Any]  # of a node, by name
Rule = Callable[[Attributes, Inputs], Result]


def _given(inputs: Inputs, place: int) -> Value:
    value = inputs[place]
    if value is None:
        raise ValueError(f"input {place} is left out")
    return value


def _numbers(inputs: Inputs, place: int) -> tuple[int, ...]:
    numbers = _given(inputs, place).numbers
    if numbers is None:
        raise ValueError(f"input {place} is known only when it runs")
    return numbers


def _same(node: Attributes, inputs: Inputs) -> Result:
    del node
    x = _given(inputs, 0)
    return Result((Value(x.shape, x.bits),))


def _broadcast(node: Attributes, inputs: Inputs) -> Result:
    del node
    x, y = _given(inputs, 0), _given(inputs, 1)
    return Result((Value(np.broadcast_shapes(x.shape, y.shape), x.bits),))


def _cast(node: Attributes, inputs: Inputs) -> Result:
    x = _given(inputs, 0)
    return Result((Value(x.shape, BITS[node["to"]], x.numbers),))


def _skip_norm(node: Attributes, inputs: Inputs) -> Result:
    value = _same(node, inputs).values[0]
    return Result((value, None, None, value))


def _dequantize(node: Attributes, inputs: Inputs) -> Result:
    del node
    return Result((Value(_given(inputs, 0).shape, _given(inputs, 1).bits),))


def _quantize(node: Attributes, inputs: Inputs) -> Result:
    del node
    return Result((Value(_given(inputs, 0).shape, _given(inputs, 2).bits),))


def _conv(node: Attributes, inputs: Inputs) -> Result:
    x, kernel = _given(inputs, 0), _given(inputs, 1)
    sizes, axes = kernel.shape[2:], len(kernel.shape) - 2
    strides, dilations = node.get("strides", [1] * axes), node.get("dilations", [1] * axes)
    pads = node.get("pads", [0] * 2 * axes)
    edges = tuple(
        (n + pads[i] + pads[i + axes] - dilations[i] * (sizes[i] - 1) - 1) // strides[i] + 1
        for i, n in enumerate(x.shape[2:])
    )
    out = (x.shape[0], kernel.shape[0], *edges)
    if x.shape[1] != kernel.shape[1] * node.get("group", 1):
        raise ValueError(f"{x.shape[1]} channels do not fit the kernel {list(kernel.shape)}")
    return Result((Value(out, x.bits),), num_elements(out) * num_elements(kernel.shape[1:]))


def _matmul(node: Attributes, inputs: Inputs) -> Result:
    x, y = (
        (*v.shape[:-2], v.shape[-1], v.shape[-2]) if node.get(key, 0) else v.shape
        for v, key in ((_given(inputs, 0), "transA"), (_given(inputs, 1), "transB"))
    )
    if x[-1] != y[-2]:
        raise ValueError(f"{list(x)} times {list(y)}")
    out = (*np.broadcast_shapes(x[:-2], y[:-2]), x[-2], y[-1])
    return Result((Value(out, _given(inputs, 0).bits),), num_elements(out) * x[-1])


def _matmul_nbits(node: Attributes, inputs: Inputs) -> Result:
    x = _given(inputs, 0)
    if x.shape[-1] != node["K"]:
        raise ValueError(f"{list(x.shape)} times a matrix of {node['K']} rows")
    out = (*x.shape[:-1], node["N"])
    return Result((Value(out, x.bits),), num_elements(out) * node["K"])


def _grouped_attention(node: Attributes, inputs: Inputs) -> Result:
    """Causal: a query meets what came before it and itself."""
    x, past = _given(inputs, 0), _given(inputs, 3)
    batch, tokens, _ = x.shape
    _, kv_heads, length, head_dim = past.shape
    width = node["num_heads"] * head_dim
    met = tokens * length + tokens * (tokens + 1) // 2
    row = 2 * batch * kv_heads * head_dim * past.bits // 8  # a key and a value
    tables = tuple(
        (place, tokens, _given(inputs, place).shape[0])
        for place in (7, 8)
        if len(inputs) > place and inputs[place] is not None
    )
    return Result(
        (Value((batch, tokens, width), x.bits), None, None),
        2 * batch * width * met,
        row * (length + 2 * tokens),
        tables,
    )


def _attention(node: Attributes, inputs: Inputs) -> Result:
    del node
    query, key, value = (_given(inputs, place) for place in range(3))
    batch, rows, width = query.shape
    macs = batch * rows * key.shape[1] * (width + value.shape[2])
    return Result((Value((batch, rows, value.shape[2]), query.bits),), macs)


def _gather(node: Attributes, inputs: Inputs) -> Result:
    table, rows = _given(inputs, 0), _given(inputs, 1)
    axis = node.get("axis", 0) % len(table.shape)
    out = (*table.shape[:axis], *rows.shape, *table.shape[axis + 1 :])
    numbers = None
    if table.numbers is not None and rows.numbers is not None and len(table.shape) == 1:
        numbers = tuple(table.numbers[row] for row in rows.numbers)
    return Result(
        (Value(out, table.bits, numbers),),
        looked_up=((0, num_elements(rows.shape), table.shape[axis]),),
    )


def _reshape(node: Attributes, inputs: Inputs) -> Result:
    del node
    x, asked = _given(inputs, 0), _numbers(inputs, 1)
    shape = [x.shape[i] if n == 0 else n for i, n in enumerate(asked)]
    known, total = num_elements([n for n in shape if n != -1]), num_elements(x.shape)
    if -1 in shape:
        shape[shape.index(-1)] = total // known
    if num_elements(shape) != total:
        raise ValueError(f"{list(x.shape)} as {list(asked)}")
    return Result((Value(tuple(shape), x.bits),))


def _transpose(node: Attributes, inputs: Inputs) -> Result:
    x = _given(inputs, 0)
    return Result((Value(tuple(x.shape[axis] for axis in node["perm"]), x.bits),))


def _split(node: Attributes, inputs: Inputs) -> Result:
    x = _given(inputs, 0)
    axis = node.get("axis", 0) % len(x.shape)
    sizes: Sequence[int]
    if len(inputs) > 1:
        sizes = _numbers(inputs, 1)
    else:
        sizes = [x.shape[axis] // node["num_outputs"]] * node["num_outputs"]
    return Result(tuple(Value((*x.shape[:axis], n, *x.shape[axis + 1 :]), x.bits) for n in sizes))


def _concat(node: Attributes, inputs: Inputs) -> Result:
    values = [_given(inputs, place) for place in range(len(inputs))]
    axis = node["axis"] % len(values[0].shape)
    shape = list(values[0].shape)
    shape[axis] = sum(v.shape[axis] for v in values)
    return Result((Value(tuple(shape), values[0].bits),))


def _unsqueeze(node: Attributes, inputs: Inputs) -> Result:
    del node
    x, axes = _given(inputs, 0), _numbers(inputs, 1)
    rank = len(x.shape) + len(axes)
    added = {axis % rank for axis in axes}
    rest = iter(x.shape)
    return Result((Value(tuple(1 if i in added else next(rest) for i in range(rank)), x.bits),))


def _slice(node: Attributes, inputs: Inputs) -> Result:
    del node
    x, starts, ends = _given(inputs, 0), _numbers(inputs, 1), _numbers(inputs, 2)
    axes = _numbers(inputs, 3) if len(inputs) > 3 else tuple(range(len(starts)))
    steps = _numbers(inputs, 4) if len(inputs) > 4 else (1,) * len(starts)
    shape = list(x.shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        shape[axis] = len(range(*slice(start, end, step).indices(shape[axis])))
    return Result((Value(tuple(shape), x.bits),))


def _pool(node: Attributes, inputs: Inputs) -> Result:
    del node
    x = _given(inputs, 0)
    return Result((Value((*x.shape[:2], *(1 for _ in x.shape[2:])), x.bits),))


def _reduce(node: Attributes, inputs: Inputs) -> Result:
    x, axes = _given(inputs, 0), _numbers(inputs, 1)
    gone = {axis % len(x.shape) for axis in axes}
    kept = bool(node.get("keepdims", 1))
    shape = tuple(1 if i in gone else n for i, n in enumerate(x.shape) if kept or i not in gone)
    return Result((Value(shape, x.bits),))


def _shape(node: Attributes, inputs: Inputs) -> Result:
    shape = _given(inputs, 0).shape[node.get("start", 0) : node.get("end")]
    return Result((Value((len(shape),), 64, shape),))


# Bits of an element, by the number of its type in the protobuf.
BITS: Final = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 16: 16, 21: 4, 22: 4}
# What gives the same bytes under another shape.
VIEWS: Final = frozenset({"Reshape", "Unsqueeze"})
RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(
        ("Gelu", "QuickGelu", "Relu", "Sigmoid", "LayerNormalization", "SimplifiedLayerNormalization"), _same
    ),
    **dict.fromkeys(("Add", "Sub", "Mul", "BitwiseAnd", "BitShift"), _broadcast),
    **dict.fromkeys(("MatMul", "FusedMatMul"), _matmul),
    "Cast": _cast,
    "Concat": _concat,
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Gather": _gather,
    "GlobalAveragePool": _pool,
    "GroupQueryAttention": _grouped_attention,
    "MatMulNBits": _matmul_nbits,
    "MultiHeadAttention": _attention,
    "QuantizeLinear": _quantize,
    "ReduceSum": _reduce,
    "Reshape": _reshape,
    "Shape": _shape,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
