"""Decoding compressed weights: numpy arrays as they are stored in, float32 (or the integers asked for) out.

Arithmetic is `float32(q - zero_point) * float32(scale)`, which is exact for integers of up to 8 bits and
scales of float16. Work is done in pieces, so that beside the result little memory is needed.
"""

import math
from typing import Any, Final

import numpy as np

from fastvlm_convert.mil.blob import unpack
from fastvlm_convert.mil.ops.table import constexpr
from fastvlm_convert.mil.types import MAX_ELEMENTS, ElementType, element_named

_PIECE: Final = 1 << 22


def _float(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32, copy=False)


def _blocks(shape: tuple[int, ...], groups: tuple[int, ...], what: str) -> tuple[int, ...]:
    """How many elements along each axis share one entry."""
    if len(shape) != len(groups) or any(g < 1 or n % g for n, g in zip(shape, groups, strict=True)):
        raise ValueError(f"{what} of shape {list(groups)} does not divide data of shape {list(shape)}")
    return tuple(n // g for n, g in zip(shape, groups, strict=True))


def _spread(values: np.ndarray, blocks: tuple[int, ...]) -> np.ndarray:
    """Each entry repeated over its block; axes of one entry are left to broadcasting."""
    for axis, size in enumerate(blocks):
        if size > 1 and values.shape[axis] > 1:
            values = np.repeat(values, size, axis)
    return values


@constexpr("constexpr_blockwise_shift_scale")
def blockwise_shift_scale(
    data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None
) -> np.ndarray:
    """Scale * (data - offset), with one scale and offset a block."""
    blocks = _blocks(data.shape, scale.shape, "scale")
    if offset is not None and offset.shape != scale.shape:
        raise ValueError(f"offset of shape {list(offset.shape)}, scale of {list(scale.shape)}")
    if not data.ndim or not data.size:
        raise ValueError("data without elements")
    result = np.empty(data.shape, np.float32)
    step = max(1, _PIECE // (data.size // len(data)) // blocks[0]) * blocks[0]
    for row in range(0, len(data), step):
        piece = result[row : row + step]
        piece[...] = data[row : row + step]
        groups = slice(row // blocks[0], -(-(row + step) // blocks[0]))
        for array, combine in ((offset, np.subtract), (scale, np.multiply)):
            if array is not None:
                combine(piece, _spread(_float(array[groups]), blocks), out=piece)
    return result


@constexpr("constexpr_affine_dequantize")
def affine_dequantize(
    quantized_data: np.ndarray, zero_point: np.ndarray, scale: np.ndarray, axis: np.ndarray
) -> np.ndarray:
    """Scale * (quantized_data - zero_point), with one of each, or one a row of `axis`."""
    rank = quantized_data.ndim
    if not -rank <= int(axis) < rank:
        raise ValueError(f"axis {int(axis)} of {rank}")
    along = [1] * rank
    along[int(axis)] = -1
    result = quantized_data.astype(np.float32)
    for array, combine in ((zero_point, np.subtract), (scale, np.multiply)):
        combine(result, _float(array).reshape(along if array.ndim else ()), out=result)
    return result


@constexpr("constexpr_cast")
def cast(source_val: np.ndarray, output_dtype: str) -> np.ndarray:
    """The same numbers in another type."""
    return source_val.astype(element_named(output_dtype, "output_dtype").numpy)


@constexpr("constexpr_lut_to_dense")
def lut_to_dense(
    indices: np.ndarray,
    lut: np.ndarray,
    shape: np.ndarray | None = None,
    vector_axis: np.ndarray | None = None,
) -> np.ndarray:
    """Entries of a palette.

    Args:
        indices: Up to iOS 16 (`shape` is given) uint8 [bytes] of packed indices, else indices of the result's
            shape.
        lut: Up to iOS 16 [entries]; else [*groups, entries, vector]: each group of indices has its own.
        shape: Of the result, up to iOS 16.
        vector_axis: Along which the vectors of `lut` are laid out, if they have more than one element.
    """
    if shape is not None:
        bits = int(lut.size).bit_length() - 1
        if bits not in (1, 2, 4, 6, 8) or lut.size != 1 << bits:
            raise ValueError(f"a palette of {lut.size} entries")
        packed = ElementType(f"uint{bits}", bits, np.dtype(np.uint8))
        return lut.reshape(-1)[_unpacked(indices, packed, shape)]
    if lut.ndim != indices.ndim + 2 or not indices.ndim:
        raise ValueError(f"a palette of {lut.ndim} axes for indices of {indices.ndim}")
    groups, (entries, width) = lut.shape[:-2], lut.shape[-2:]
    blocks = _blocks(indices.shape, groups, "lut")
    if indices.size and int(indices.max()) >= entries:
        raise ValueError(f"index {int(indices.max())} into {entries} entries")
    if width != 1 and vector_axis is None:
        raise ValueError("a palette of vectors without vector_axis")
    _check_size(indices.size * width)
    which = np.zeros(groups, np.int32)
    which.reshape(-1)[:] = np.arange(which.size) * entries
    if width == 1:
        return _looked_up(lut.reshape(-1), which, indices, blocks)
    where = _spread(which, blocks) + indices
    table = lut.reshape(-1, width)
    assert vector_axis is not None
    axis = int(vector_axis)
    if not -indices.ndim <= axis < indices.ndim:
        raise ValueError(f"vector_axis {axis} of {indices.ndim}")
    axis %= indices.ndim
    vectors = np.moveaxis(table[where], -1, axis + 1)
    return vectors.reshape(*indices.shape[:axis], indices.shape[axis] * width, *indices.shape[axis + 1 :])


def _looked_up(
    table: np.ndarray, first: np.ndarray, indices: np.ndarray, blocks: tuple[int, ...]
) -> np.ndarray:
    """Entries of a table, piece by piece: each index counts from the first entry of its group."""
    dense = np.empty(indices.shape, table.dtype)
    step = max(1, _PIECE // max(indices[:1].size, 1) // blocks[0]) * blocks[0]
    for row in range(0, len(indices), step):
        groups = slice(row // blocks[0], -(-(row + step) // blocks[0]))
        dense[row : row + step] = table[_spread(first[groups], blocks) + indices[row : row + step]]
    return dense


@constexpr("constexpr_sparse_to_dense")
def sparse_to_dense(
    nonzero_data: np.ndarray, mask: np.ndarray, shape: np.ndarray | None = None
) -> np.ndarray:
    """Values where the mask is set, else 0; up to iOS 16 (`shape` is given) the mask is packed in bytes."""
    if shape is not None:
        mask = _unpacked(mask, ElementType("uint1", 1, np.dtype(np.uint8)), shape)
    hits = mask != 0
    if nonzero_data.ndim != 1 or np.count_nonzero(hits) != nonzero_data.size:
        raise ValueError(f"{nonzero_data.size} values for {np.count_nonzero(hits)} places")
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[hits] = nonzero_data
    return dense


@constexpr("constexpr_lut_to_sparse")
def lut_to_sparse(
    indices_mask: np.ndarray,
    indices_nonzero_data: np.ndarray,
    lut: np.ndarray,
    vector_axis: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Entries of a palette for the places that the mask sets: the mask of the result, and its values."""
    indices = sparse_to_dense(indices_nonzero_data, indices_mask)
    dense = lut_to_dense(indices, lut, None, vector_axis)
    mask = indices_mask
    if dense.shape != mask.shape and vector_axis is not None:
        mask = np.repeat(mask, lut.shape[-1], int(vector_axis))
    return mask, dense[mask != 0]


@constexpr("constexpr_sparse_blockwise_shift_scale")
def sparse_blockwise_shift_scale(
    data_mask: np.ndarray, nonzero_data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scale * (data - offset) for the places that the mask sets: the mask, and the values."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


def _unpacked(packed: np.ndarray, element: ElementType, shape: np.ndarray) -> np.ndarray:
    sizes = tuple(int(n) for n in np.atleast_1d(shape))
    count = math.prod(sizes)
    _check_size(count)
    if min(sizes, default=0) < 0 or packed.size != (count * element.bits + 7) // 8:
        raise ValueError(f"{packed.size} bytes for {list(sizes)} of {element.bits} bits")
    raw: Any = packed.astype(np.uint8, copy=False)
    return unpack(raw, element, count).reshape(sizes)


def _check_size(count: int) -> None:
    if count > MAX_ELEMENTS:
        raise ValueError(f"{count} elements")
