"""Tensors in files: where each lies, and reading its rows without mapping or copying the file."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastvlm_convert.arithmetic import num_elements
from fastvlm_convert.errors import CheckpointError, shortened, shown
from fastvlm_convert.regular_file import open_file
from fastvlm_convert.weights.source import Weight

# Stored dtypes of which weights are made. bfloat16 is read as raw bits: numpy has no such type.
FLOAT_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float64": "<f8"}
OTHER_DTYPES = {"int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "<i1", "uint8": "<u1", "bool": "<u1"}
WRITTEN_DTYPES = {"uint32": "<u4"}  # of files for other programs; no weight is read from one

# Far above any FastVLM; a header that claims more is damaged or hostile.
MAX_TENSOR_ELEMENTS = 1 << 34
MAX_TENSOR_AXES = 8
AGAIN = "download or copy the file again"


def numpy_dtype(dtype: str) -> str:
    """What numpy calls a stored dtype."""
    return (FLOAT_DTYPES | OTHER_DTYPES | WRITTEN_DTYPES)[dtype]


def item_size(dtype: str) -> int:
    """Bytes per element of a stored dtype."""
    return np.dtype(numpy_dtype(dtype)).itemsize


@dataclass(frozen=True)
class FileTensor:
    """A C-contiguous tensor in a file, read by position.

    Attributes:
        path: The file. It is opened for each read, so that no descriptor or mapping is kept.
        offset: Byte offset of the first element.
        shape: Dimensions.
        dtype: A key of `FLOAT_DTYPES` or `OTHER_DTYPES`.
        name: The tensor's name in the file, for messages.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str
    name: str

    @property
    def num_bytes(self) -> int:
        """Bytes it takes."""
        return num_elements(self.shape) * item_size(self.dtype)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the first axis, in the dtype they are stored in.

        Raises:
            CheckpointError: They cannot be read whole.
        """
        row = num_elements(self.shape[1:])
        stored = np.empty((stop - start) * row, numpy_dtype(self.dtype))
        _read_exactly(self.path, stored, self.offset + start * row * stored.itemsize)
        return stored.reshape((stop - start, *self.shape[1:]))

    def weight(self) -> Weight:
        """The tensor as float32.

        Returns:
            A weight whose `read` raises `CheckpointError` when the tensor holds NaN or infinity, is not of a
            floating-point dtype, or cannot be read whole.
        """
        return Weight(self.shape, self.dtype, self._read)

    def _read(self, start: int, stop: int) -> np.ndarray:
        if self.dtype not in FLOAT_DTYPES:
            allowed = ", ".join(FLOAT_DTYPES)
            raise CheckpointError(
                f"tensor '{self.name}' is stored as {self.dtype}; weights must be one of {allowed}",
                where=self.path,
                hint="give the unquantized checkpoint",
            )
        values = _to_float32(self.rows(start, stop), self.dtype)
        if not np.isfinite(values).all():
            bad = int(values.size - np.isfinite(values).sum())
            raise CheckpointError(
                f"tensor '{self.name}' holds {bad} values that are NaN or infinite",
                where=self.path,
                hint="the checkpoint is damaged or its training diverged; export it again",
            )
        return values


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
        with open_file(path) as file:
            file.seek(offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    message = "file ends inside a tensor; it is truncated"
                    raise CheckpointError(message, where=path, hint=AGAIN)
                done += count
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=path, hint=AGAIN) from error


def read_bytes(path: Path, offset: int, count: int) -> bytes:
    """Up to `count` bytes of a file from `offset` on; fewer where the file ends.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        with open_file(path) as file:
            file.seek(offset)
            return file.read(count)
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=path, hint=AGAIN) from error


def check_shape(shape: object, name: str, path: Path) -> tuple[int, ...]:
    """Validate a tensor shape that a file claims."""
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > MAX_TENSOR_AXES
        or not all(type(n) is int and 0 <= n <= MAX_TENSOR_ELEMENTS for n in shape)
    ):
        what = f"tensor '{shortened(name, 100)}' has an impossible shape {shown(shape)}"
        raise CheckpointError(what, where=path, hint=AGAIN)
    if num_elements(shape) > MAX_TENSOR_ELEMENTS:
        what = f"tensor '{shortened(name, 100)}' has an absurd shape {list(shape)}"
        raise CheckpointError(what, where=path, hint=AGAIN)
    return tuple(shape)


def file_size(path: Path) -> int:
    """Size in bytes of a regular file.

    Raises:
        CheckpointError: There is no such regular file.
    """
    try:
        with open_file(path) as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path.name}' is missing", where=path.parent, hint=AGAIN) from error
    except OSError as error:  # for example a name that the file system cannot have
        raise CheckpointError(f"cannot read: {error.strerror}", where=path, hint=AGAIN) from error
