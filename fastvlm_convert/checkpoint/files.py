"""Tensors in checkpoint files: where each lies, and reading its rows without mapping or copying the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_convert.errors import CheckpointError, ConversionError
from fastvlm_convert.weights.source import Weight

# Stored dtypes of which weights are made. bfloat16 is read as raw bits: numpy has no such type.
FLOAT_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float64": "<f8"}
OTHER_DTYPES = {"int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "<i1", "uint8": "<u1", "bool": "<u1"}

# Far above any FastVLM; a header that claims more is damaged or hostile.
MAX_TENSOR_ELEMENTS = 1 << 34
MAX_TENSOR_AXES = 8


def item_size(dtype: str) -> int:
    """Bytes per element of a stored dtype."""
    return np.dtype((FLOAT_DTYPES | OTHER_DTYPES)[dtype]).itemsize


def file_weight(path: Path, offset: int, shape: tuple[int, ...], dtype: str, name: str) -> Weight:
    """A C-contiguous tensor in a file, read by position.

    Args:
        path: The file. It is opened for each read, so that no descriptor or mapping is kept.
        offset: Byte offset of the first element.
        shape: Dimensions.
        dtype: A key of `FLOAT_DTYPES` or `OTHER_DTYPES`.
        name: The tensor's name in the checkpoint, for messages.

    Returns:
        A weight whose `read` raises `CheckpointError` when the tensor holds NaN or infinity, is not of a
        floating-point dtype, or cannot be read whole.
    """
    row = int(np.prod(shape[1:], dtype=np.int64))

    def read(start: int, stop: int) -> np.ndarray:
        if dtype not in FLOAT_DTYPES:
            allowed = ", ".join(FLOAT_DTYPES)
            raise CheckpointError(
                f"tensor '{name}' is stored as {dtype}; weights must be one of {allowed}", where=path
            )
        stored = np.empty((stop - start) * row, FLOAT_DTYPES[dtype])
        _read_exactly(path, stored, offset + start * row * stored.itemsize)
        values = _to_float32(stored, dtype).reshape((stop - start, *shape[1:]))
        if not np.isfinite(values).all():
            bad = int(values.size - np.isfinite(values).sum())
            raise CheckpointError(
                f"tensor '{name}' holds {bad} values that are NaN or infinite",
                where=path,
                hint="the checkpoint is damaged or its training diverged; export it again",
            )
        return values

    return Weight(shape, dtype, read)


def _to_float32(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":  # bfloat16 is the upper half of a float32
        wide = stored.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is reported as such
        return stored.astype(np.float32, copy=False)


def _read_exactly(path: Path, into: np.ndarray, offset: int) -> None:
    view = into.data.cast("B")
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError("file ends inside a tensor; it is truncated", where=path)
                done += count
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=path) from error


def read_bytes(path: Path, offset: int, count: int) -> bytes:
    """Up to `count` bytes of a file from `offset` on; fewer where the file ends.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(count)
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=path) from error


def check_shape(shape: object, name: str, path: Path) -> tuple[int, ...]:
    """Validate a tensor shape that a file claims."""
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > MAX_TENSOR_AXES
        or not all(type(n) is int and 0 <= n <= MAX_TENSOR_ELEMENTS for n in shape)
    ):
        raise CheckpointError(f"tensor '{name}' has an impossible shape {shape!r}", where=path)
    elements = 1
    for n in shape:
        elements *= n
    if elements > MAX_TENSOR_ELEMENTS:
        raise CheckpointError(f"tensor '{name}' has an absurd shape {list(shape)}", where=path)
    return tuple(shape)


def read_json(path: Path, kind: type[ConversionError] = CheckpointError) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint.

    Args:
        path: The file.
        kind: The error to raise.

    Raises:
        ConversionError: The file is missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise kind(f"'{path.name}' is missing", where=path.parent) from error
    except OSError as error:
        raise kind(f"cannot read: {error.strerror}", where=path) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of 5000 digits
        raise kind(f"not valid JSON: {error}", where=path) from error
    if not isinstance(value, dict):
        raise kind(f"expected a JSON object, found {type(value).__name__}", where=path)
    return value


def file_size(path: Path) -> int:
    """Size in bytes of a regular file.

    Raises:
        CheckpointError: There is no such regular file.
    """
    try:
        if path.is_file():
            return path.stat().st_size
    except OSError as error:  # for example a name that the file system cannot have
        raise CheckpointError(f"cannot read: {error.strerror}", where=path) from error
    raise CheckpointError(f"'{path.name}' is missing", where=path.parent)
