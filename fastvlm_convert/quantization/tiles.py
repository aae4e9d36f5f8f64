"""Weights that are solved tile by tile; solved tiles are kept in the user's cache.

A tile is a fixed run of rows of about a million weights, so that all targets, the reference of `verify` and
an export that goes on after an interruption ask for the same ones. Its key is a hash of its floats and its
scheme, whatever checkpoint or layer they are of: read, hashed and checked in a few thousandths of a second,
where a search takes tenths.

A file is the SHA-256 of what follows, and the tensors of `quantized/codec.py` one behind the other.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from fastvlm_convert.arithmetic import num_elements
from fastvlm_convert.atomic_file import put_file
from fastvlm_convert.quantization.stages import SEARCHED
from fastvlm_convert.quantized.codec import matrix_entries, matrix_tensors
from fastvlm_convert.quantized.schemes import AffineMatrix, PaletteMatrix, QuantizedMatrix, Scheme
from fastvlm_convert.regular_file import read_file
from fastvlm_convert.user_cache import current_tally, is_cache_used, touch
from fastvlm_convert.weights.source import Weight

TILE: Final = 1 << 20  # weights: a few megabytes in memory, and some hundred files for 0.5B
SMALLEST: Final = 1 << 16  # weights of a layer worth a file; fewer are found again in hundredths of a second
_SPARE_BYTES: Final = 2 << 30  # of the disk, left for what the run is for
_DIGEST_BYTES: Final = 32
_FEW: Final = 16  # a smaller part of a tile, as one row of a table, is solved faster than a tile is read back

_M = TypeVar("_M", AffineMatrix, PaletteMatrix)
Tensors = Mapping[str, np.ndarray]


def by_tiles(
    weight: Weight, scheme: Scheme, solve: Callable[[np.ndarray], _M], restore: Callable[[Tensors], _M]
) -> Callable[[int, int], _M]:
    """A function that gives rows [start, stop) of a weight, solved.

    Args:
        weight: Floats; rows are the first axis.
        scheme: How they are quantized.
        solve: float32 [rows, columns] of whole groups -> the same quantized.
        restore: What `matrix_tensors` made of such a matrix -> the matrix.
    """
    folder = SEARCHED.folder if is_cache_used() and weight.size >= SMALLEST else None
    together = scheme.rows_together
    step = max(1, TILE // (num_elements(weight.shape[1:]) * together)) * together

    def read(start: int, stop: int) -> _M:
        if folder is None:
            return solve(_matrix(weight, start, stop))
        parts = []
        for first in range(start // step * step, stop, step):
            last = min(first + step, weight.shape[0])
            begin, end = max(start, first), min(stop, last)
            if (end - begin) * _FEW < last - first:
                parts.append(solve(_matrix(weight, begin, end)))
                continue
            tile = _tile(folder, _matrix(weight, first, last), scheme, solve, restore)
            is_whole = (begin, end) == (first, last)
            parts.append(tile if is_whole else tile.read(begin - first, end - first))
        return parts[0] if len(parts) == 1 else type(parts[0]).joined(parts)

    return read


def _tile(
    folder: Path,
    floats: np.ndarray,
    scheme: Scheme,
    solve: Callable[[np.ndarray], _M],
    restore: Callable[[Tensors], _M],
) -> _M:
    """A tile from the cache, or solved and put there."""
    key = hashlib.sha256(repr((floats.shape, scheme)).encode())
    key.update(floats.data)
    path = folder / f"{key.hexdigest()}{SEARCHED.suffix}"
    tensors = _load(path, scheme, floats.shape)
    current_tally().note(SEARCHED, path.name, tensors is not None)
    if tensors is not None:
        touch(path)
        return restore(tensors)
    matrix = solve(floats)
    _save(path, matrix)
    return matrix


def _save(path: Path, matrix: QuantizedMatrix) -> None:
    content = b"".join(tensor.tobytes() for tensor in matrix_tensors(matrix).values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free > _SPARE_BYTES:
            put_file(path, hashlib.sha256(content).digest() + content)
    except OSError:
        return  # nothing but time depends on this file: where it cannot be kept, the tile is solved again


def _load(path: Path, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, np.ndarray] | None:
    """The tensors of a tile; None where there are none, or damaged ones."""
    entries = matrix_entries(scheme, *shape)
    sizes = {part: np.dtype(dtype).itemsize * num_elements(dims) for part, (dtype, dims) in entries.items()}
    try:
        raw = read_file(path, _DIGEST_BYTES + sum(sizes.values()))
    except OSError:  # a cache that cannot be read is no cache
        return None
    content = memoryview(raw)[_DIGEST_BYTES:]
    if len(content) != sum(sizes.values()) or hashlib.sha256(content).digest() != raw[:_DIGEST_BYTES]:
        return None
    tensors, offset = {}, 0
    for part, (dtype, dims) in entries.items():
        tensors[part] = np.frombuffer(content, dtype, num_elements(dims), offset).reshape(dims)
        offset += sizes[part]
    return tensors


def _matrix(weight: Weight, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop), all other axes in one; float32."""
    return np.ascontiguousarray(weight.read(start, stop).reshape(stop - start, -1), np.float32)
