"""Weights as the tensors of a safetensors file: floats as they are, integers packed into words."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.exporters.job import OnBytes
from fastvlm_convert.exporters.mlx.groups import biases, scale_dtype
from fastvlm_convert.io_names import FloatName
from fastvlm_convert.quantized.packing import pack, packed_columns
from fastvlm_convert.quantized.weight import QuantizedWeight
from fastvlm_convert.weights.safetensors_file import Entries
from fastvlm_convert.weights.source import Weight, computed
from fastvlm_convert.weights.storage import to_storage

Rows = Iterator[tuple[int, dict[str, np.ndarray]]]  # first row, and by tensor the rows from there on

_WORD = 4  # bytes


@dataclass(frozen=True)
class NamedWeight:
    """A weight under the name that a client looks up.

    Attributes:
        name: The tensor's, `MODULE.weight` for example.
        weight: Its values, in MLX's layout.
        storage: Dtype of a matrix of floats.
        compute: Dtype of the arithmetic that it takes part in.
        is_table: Whether rows of it are looked up.
    """

    name: str
    weight: Weight | QuantizedWeight
    storage: FloatName
    compute: FloatName
    is_table: bool = False


@dataclass(frozen=True)
class Tensors:
    """The tensors of one weight.

    Attributes:
        entries: Name -> dtype and shape.
        rows: Reads them from the first row to the last.
    """

    entries: Entries
    rows: Callable[[], Rows]


def tensors(named: NamedWeight, on_bytes: OnBytes) -> Tensors:
    """What is stored of a weight.

    Args:
        named: The weight.
        on_bytes: Called with the bytes of what is read, counted as float32.
    """
    if isinstance(named.weight, QuantizedWeight):
        dtype = scale_dtype(named.weight.scheme, named.compute, named.is_table)
        return _integers(named.name, named.weight, dtype, on_bytes)
    return _floats(named.name, named.weight, _float_dtype(named), on_bytes)


def channels_last(weight: Weight) -> Weight:
    """A convolution's [out, in, height, width] as MLX's [out, height, width, in]."""
    out, inside, height, width = weight.shape

    def read(start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(weight.read(start, stop).transpose(0, 2, 3, 1))

    return Weight((out, height, width, inside), weight.dtype, read)


def constant(shape: tuple[int, ...], value: float) -> Weight:
    """A weight that a client demands where ours is folded into another."""
    return computed(shape, "float32", lambda: np.full(shape, value, np.float32))


def _float_dtype(named: NamedWeight) -> FloatName:
    """MLX computes in the wider dtype of its operands, so vectors decide in which a whole part computes."""
    shape = named.weight.shape
    return named.compute if max(shape) == named.weight.size else named.storage  # type: ignore[union-attr]


def _floats(name: str, weight: Weight, dtype: FloatName, on_bytes: OnBytes) -> Tensors:
    def rows() -> Rows:
        first = 0
        for chunk in weight.chunks():
            yield first, {name: to_storage(chunk, dtype, name)}
            first += len(chunk)
            on_bytes(4 * chunk.size)

    return Tensors({name: (dtype, weight.shape)}, rows)


def _integers(name: str, weight: QuantizedWeight, dtype: FloatName, on_bytes: OnBytes) -> Tensors:
    module, scheme = name.removesuffix(".weight"), weight.scheme
    words = packed_columns(weight.columns, scheme.bits) // _WORD
    blocks = (weight.rows, scheme.num_blocks(weight.columns))

    def rows() -> Rows:
        for first, stop in weight.spans(0, weight.rows):
            matrix = weight.read(first, stop)
            packed = np.ascontiguousarray(pack(matrix.q, scheme.bits)).view("<u4")
            scales = matrix.scale.astype(dtype)
            yield (
                first,
                {
                    name: packed,
                    f"{module}.scales": scales,
                    f"{module}.biases": to_storage(biases(matrix, dtype), dtype, f"{module}.biases"),
                },
            )
            on_bytes(4 * matrix.q.size)

    return Tensors(
        {
            name: ("uint32", (weight.rows, words)),
            f"{module}.scales": (dtype, blocks),
            f"{module}.biases": (dtype, blocks),
        },
        rows,
    )
