"""Weights of a program under construction: shapes now, bytes when the blob is written."""

from collections.abc import Callable
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb  # noqa: N813  coremltools' own convention
from coremltools.converters.mil.mil import Var, types

from fastvlm_convert.errors import TargetError
from fastvlm_convert.io_names import FloatName
from fastvlm_convert.quantized.schemes import AffineScheme
from fastvlm_convert.quantized.weight import PaletteWeight, QuantizedWeight
from fastvlm_convert.weights.source import Weight

OnBytes = Callable[[int], None]

# Most elements of a constant that coremltools puts into the program itself, so that it is read at once.
_SMALL = 9


class _Flat(np.ndarray):
    """Values on their way into the file. The blob writer asks for `tobytes()`, of which it only reads."""

    def tobytes(self, order: Any = "C") -> Any:  # noqa: ANN401
        """The memory itself: a copy would double the peak of the largest weight."""
        return self.view(np.ndarray).data


class LazyArray(np.ndarray):
    """An array of the right shape and dtype that holds no data.

    coremltools' blob writer calls `flatten()` once per blob: only then the weight is read. Anything else, a
    graph pass above all, sees zeros; so no passes run, and `Weights.check_all_written` counts the reads.
    """

    _load: Callable[[], np.ndarray]
    num_reads: int

    def __new__(cls, shape: tuple[int, ...], dtype: type, load: Callable[[], np.ndarray]) -> "LazyArray":
        array = np.broadcast_to(np.zeros((), dtype), shape).view(cls)
        array._load = load
        array.num_reads = 0
        return array

    def __array_finalize__(self, parent: Any) -> None:  # noqa: ANN401
        self._load = getattr(parent, "_load", lambda: np.zeros(0))
        self.num_reads = 0

    def flatten(self, order: Any = "C") -> np.ndarray:  # noqa: ANN401
        """Read the weight; called by the blob writer."""
        self.num_reads += 1
        values = self._load()
        assert values.shape == self.shape
        return values.reshape(-1).view(_Flat)


class Weights:
    """Constants of a program by key; a key used in several functions is one blob.

    Args:
        on_bytes: Called with the number of bytes of each weight written, counted as float32.
    """

    def __init__(self, on_bytes: OnBytes) -> None:
        self._on_bytes = on_bytes
        self._values: dict[str, np.ndarray] = {}
        self._vars: dict[str, Var] = {}

    def start_function(self) -> None:
        """Call first in each function: a Var belongs to one function."""
        self._vars = {}

    def weight(
        self,
        key: str,
        storage: FloatName,
        compute: FloatName,
        *weights: Weight,
    ) -> Var:
        """A float weight in the compute dtype.

        Args:
            key: Name of the constant, unique in the package; an identifier.
            storage: Dtype in the file.
            compute: Dtype it is used in; a compile-time cast stands between where the two differ.
            *weights: The weight, or several that are stacked along their first axis.
        """
        shape = (sum(w.shape[0] for w in weights), *weights[0].shape[1:])

        def load() -> np.ndarray:
            return _read(key, storage, weights, shape, self._on_bytes)

        is_small = np.prod(shape, dtype=np.int64) <= _SMALL
        make = load if is_small else lambda: LazyArray(shape, _dtype(storage), load)
        return self._shared(key, storage, compute, make)

    def affine(self, key: str, compute: FloatName, weight: QuantizedWeight) -> Var:
        """A quantized weight behind the compile-time dequantization of iOS 18.

        Its scale has the compute dtype, in which the runtime multiplies; float32 holds it exactly.
        """
        if key in self._vars:
            return self._vars[key]
        parts = _AffineParts(weight, self._on_bytes)
        integer = _integer_type(weight.scheme)
        scale_shape = (weight.rows, parts.blocks, *[1] * (len(weight.shape) - 2))
        stored = [
            self._part(f"{key}_q", weight.shape, integer, parts.integers),
            self._part(f"{key}_scale", scale_shape, _dtype(compute), parts.scales),
        ]
        arguments = {"data": stored[0], "scale": stored[1]}
        if not weight.scheme.symmetric:
            arguments["offset"] = self._part(f"{key}_zero_point", scale_shape, integer, parts.zero_points)
        self._vars[key] = mb.constexpr_blockwise_shift_scale(name=key, **arguments)
        return self._vars[key]

    def palette(self, key: str, compute: FloatName, weight: PaletteWeight) -> Var:
        """A weight behind the compile-time look-up of iOS 18: a table for every group of output channels.

        A scale per channel, where there is one, multiplies what was looked up, in the same way as `affine`.
        Tables and scales have the compute dtype; float32 holds them exactly.
        """
        if key in self._vars:
            return self._vars[key]
        scheme, parts = weight.scheme, _PaletteParts(weight, self._on_bytes)
        ones = [1] * (len(weight.shape) - 1)
        tables = (scheme.num_groups(weight.rows), *ones, scheme.levels, 1)
        dense = mb.constexpr_lut_to_dense(
            indices=self._part(f"{key}_indices", weight.shape, _INDEX_TYPES[scheme.bits], parts.indices),
            lut=self._part(f"{key}_lut", tables, _dtype(compute), parts.tables),
            name=f"{key}_unscaled" if scheme.per_channel_scale else key,
        )
        if scheme.per_channel_scale:
            scale = self._part(f"{key}_scale", (weight.rows, *ones), _dtype(compute), parts.scales)
            dense = mb.constexpr_blockwise_shift_scale(data=dense, scale=scale, name=key)
        self._vars[key] = dense
        return dense

    def _part(
        self,
        key: str,
        shape: tuple[int, ...],
        dtype: Any,  # noqa: ANN401
        load: Callable[[], np.ndarray],
    ) -> Var:
        if key not in self._values:
            is_small = np.prod(shape, dtype=np.int64) <= _SMALL

            def read() -> np.ndarray:
                return (
                    load()
                    .astype(np.int8 if dtype is types.np_int4_dtype else dtype, copy=False)
                    .view(dtype)
                    .reshape(shape)
                )

            self._values[key] = read() if is_small else LazyArray(shape, dtype, read)
        var = mb.const(val=self._values[key], name=key)
        var.op.weight_id = key
        return var

    def constant(self, key: str, storage: FloatName, compute: FloatName, values: np.ndarray) -> Var:
        """A small array that is no weight of the checkpoint, shared by key like a weight."""
        return self._shared(key, storage, compute, lambda: np.ascontiguousarray(values, _dtype(storage)))

    def check_all_written(self) -> None:
        """Every weight must have been read exactly once: never zeros in the file, never the work twice."""
        for key, value in self._values.items():
            if isinstance(value, LazyArray) and value.num_reads != 1:
                raise AssertionError(f"weight '{key}' was written {value.num_reads} times")

    def _shared(
        self, key: str, storage: FloatName, compute: FloatName, make: Callable[[], np.ndarray]
    ) -> Var:
        if key in self._vars:
            return self._vars[key]
        if key not in self._values:
            self._values[key] = make()
        value = self._values[key]
        if storage == compute:
            var = mb.const(val=value, name=key)
            var.op.weight_id = key
        else:
            stored = mb.const(val=value, name=f"{key}_{storage}")
            stored.op.weight_id = key
            var = mb.cast(x=stored, dtype="fp32" if compute == "float32" else "fp16", name=key)
        self._vars[key] = var
        return var


class _AffineParts:
    """The integers, scales and zero points of a weight, which is quantized once for all three."""

    def __init__(self, weight: QuantizedWeight, on_bytes: OnBytes) -> None:
        self._weight = weight
        self._on_bytes = on_bytes
        self._rest: tuple[np.ndarray, np.ndarray] | None = None
        self.blocks = weight.scheme.num_blocks(weight.columns)

    def integers(self) -> np.ndarray:
        """Signed where symmetric, else unsigned; one a byte."""
        weight = self._weight
        q = np.empty((weight.rows, weight.columns), np.uint8)
        scales, zero_points, row = [], [], 0
        for part in weight.chunks():
            q[row : row + len(part.q)] = part.q
            row += len(part.q)
            scales.append(part.scale)
            zero_points.append(part.zero_point)
            self._on_bytes(4 * part.q.size)
        self._rest = np.concatenate(scales), np.concatenate(zero_points)
        if weight.scheme.symmetric:
            q -= np.uint8(weight.scheme.middle)  # wraps round, so the bits are those of the signed difference
            return q.view(np.int8)
        return q

    def scales(self) -> np.ndarray:
        return self._others()[0]

    def zero_points(self) -> np.ndarray:
        return self._others()[1]

    def _others(self) -> tuple[np.ndarray, np.ndarray]:
        if self._rest is None:  # the writer asks in the order of the program, integers first
            self.integers()
        assert self._rest is not None
        return self._rest


class _PaletteParts:
    """The indices, tables and scales of a weight, which is solved once for all three.

    Indices, the bulk, are kept until they are asked for, which the writer does first.
    """

    def __init__(self, weight: PaletteWeight, on_bytes: OnBytes) -> None:
        self._weight = weight
        self._on_bytes = on_bytes
        self._indices: np.ndarray | None = None
        self._small: tuple[np.ndarray, np.ndarray] | None = None

    def indices(self) -> np.ndarray:
        """One a byte."""
        self._solve()
        indices, self._indices = self._indices, None
        assert indices is not None, "indices were asked for twice"
        return indices

    def tables(self) -> np.ndarray:
        return self._solve()[0]

    def scales(self) -> np.ndarray:
        return self._solve()[1]

    def _solve(self) -> tuple[np.ndarray, np.ndarray]:
        if self._small is None:
            self._indices = np.empty((self._weight.rows, self._weight.columns), np.uint8)
            tables, scales, row = [], [np.empty(0, np.float16)], 0
            for part in self._weight.chunks():
                self._indices[row : row + len(part.indices)] = part.indices
                row += len(part.indices)
                tables.append(part.palette)
                scales += [] if part.scale is None else [part.scale]
                self._on_bytes(4 * part.indices.size)
            self._small = np.concatenate(tables), np.concatenate(scales)
        return self._small


_INDEX_TYPES: dict[int, Any] = {4: types.np_uint4_dtype, 6: types.np_uint6_dtype, 8: np.uint8}


def _integer_type(scheme: AffineScheme) -> Any:  # noqa: ANN401
    if scheme.bits == 8:
        return np.int8 if scheme.symmetric else np.uint8
    return types.np_int4_dtype if scheme.symmetric else types.np_uint4_dtype


def _dtype(name: FloatName) -> type:
    return np.float16 if name == "float16" else np.float32


def _read(
    key: str, storage: FloatName, weights: tuple[Weight, ...], shape: tuple[int, ...], on_bytes: OnBytes
) -> np.ndarray:
    values: np.ndarray = np.empty((sum(w.shape[0] for w in weights), *weights[0].shape[1:]), _dtype(storage))
    row = 0
    for weight in weights:
        for chunk in weight.chunks():
            with np.errstate(over="ignore"):
                values[row : row + len(chunk)] = chunk
            if storage == "float16" and not np.isfinite(values[row : row + len(chunk)]).all():
                raise TargetError(
                    f"weight '{key}' reaches {float(np.abs(chunk).max()):.4g}, beyond float16's 65504",
                    hint="store that component as float32 in the recipe; for a bias of keys, "
                    "`scan -o FILE` writes a recipe that repairs it",
                )
            row += len(chunk)
            on_bytes(4 * chunk.size)
    return values.reshape(shape)
