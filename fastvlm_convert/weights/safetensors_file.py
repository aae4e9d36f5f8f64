"""Read and write safetensors files.

Format: https://huggingface.co/docs/safetensors: an unsigned 64-bit header length, a JSON header of
name -> {dtype, shape, data_offsets}, the tensors without gaps. The `safetensors` package maps files into
memory, which counts against the memory budget, has no bfloat16 for numpy, and writes only whole arrays.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from fastvlm_convert.arithmetic import num_elements
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.weights.file_tensors import (
    FileTensor,
    check_shape,
    file_size,
    item_size,
    numpy_dtype,
    read_bytes,
)
from fastvlm_convert.weights.source import Weight

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, Weight]:
    """The tensors of one file, as weights.

    Raises:
        CheckpointError: As `read_header`.
    """
    return {name: tensor.weight() for name, tensor in read_header(path).items()}


def read_header(path: Path) -> dict[str, FileTensor]:
    """Where every tensor of a file lies.

    Raises:
        CheckpointError: The file is no safetensors file, is truncated, or its header is inconsistent.
    """
    size = file_size(path)
    prefix = read_bytes(path, 0, 8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(
            "not a safetensors file", where=path, hint="download it again (after a git clone: git lfs pull)"
        )
    raw = read_bytes(path, 8, length)
    if len(raw) < length:
        raise CheckpointError("the safetensors header is truncated", where=path)
    header = _parse_header(raw, path)
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {}
    for name, entry in header.items():
        dtype, shape, begin, end = _parse_entry(name, entry, path)
        expected = num_elements(shape) * item_size(dtype)
        if begin < 0 or end - begin != expected:
            raise CheckpointError(
                f"tensor '{name}' claims {end - begin} bytes, but {list(shape)} of {dtype} need {expected}",
                where=path,
            )
        if start + end > size:
            raise CheckpointError(
                f"tensor '{name}' ends at byte {start + end}, the file has {size}: it is truncated",
                where=path,
                hint="download or copy the file again",
            )
        tensors[name] = FileTensor(path, start + begin, shape, dtype, name)
    _check_apart(tensors, path)
    return tensors


def _check_apart(tensors: Mapping[str, FileTensor], path: Path) -> None:
    filled = [t for t in tensors.values() if t.num_bytes]
    for before, after in pairwise(sorted(filled, key=lambda t: t.offset)):
        if before.offset + before.num_bytes > after.offset:
            raise CheckpointError(f"tensors '{before.name}' and '{after.name}' overlap", where=path)


def _parse_header(raw: bytes, path: Path) -> dict[str, object]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("not a safetensors file: its header is no JSON", where=path) from error
    if not isinstance(header, dict):
        raise CheckpointError("not a safetensors file: its header is no JSON object", where=path)
    return header


def _parse_entry(name: str, entry: object, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if code not in _DTYPES:
                known = ", ".join(_DTYPES)
                raise CheckpointError(f"tensor '{name}' has dtype {code}; supported are {known}", where=path)
            return _DTYPES[code], check_shape(shape, name, path), begin, end
    raise CheckpointError(f"malformed header entry of tensor '{name}'", where=path)


Entries = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype and shape


@dataclass(frozen=True)
class Layout:
    """A file that is to be written: everything but the tensors' values.

    Attributes:
        path: The file.
        header: Its first bytes, length included.
        tensors: Where each tensor will lie.
        size: Bytes of the whole file.
    """

    path: Path
    header: bytes
    tensors: Mapping[str, FileTensor]
    size: int

    def create(self) -> None:
        """Write the header, and room for the tensors.

        Raises:
            OSError: The file cannot be written.
        """
        with self.path.open("wb") as file:
            file.write(self.header)
            file.truncate(self.size)

    def write(self, name: str, chunks: Iterable[np.ndarray], first_row: int = 0) -> None:
        """Write consecutive rows of a tensor, in its dtype, into a file that was created.

        Raises:
            OSError: The file cannot be written.
        """
        tensor = self.tensors[name]
        row = num_elements(tensor.shape[1:]) * item_size(tensor.dtype)
        with self.path.open("r+b", buffering=0) as file:
            file.seek(tensor.offset + first_row * row)
            for chunk in chunks:
                assert chunk.dtype.newbyteorder("<") == np.dtype(numpy_dtype(tensor.dtype)), name
                left = np.ascontiguousarray(chunk).data.cast("B")
                while left:
                    left = left[file.write(left) :]


def lay_out(path: Path, entries: Entries) -> Layout:
    """Decide where tensors lie: the widest dtypes first, so that all are aligned; else in the order given."""
    order = sorted(entries, key=lambda name: -item_size(entries[name][0]))
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    ends = [0]
    for name in order:
        dtype, shape = entries[name]
        ends.append(ends[-1] + num_elements(shape) * item_size(dtype))
    content = {
        name: {
            "dtype": codes[entries[name][0]],
            "shape": list(entries[name][1]),
            "data_offsets": list(offsets),
        }
        for name, offsets in zip(order, pairwise(ends), strict=True)
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    tensors = {
        name: FileTensor(path, start + begin, entries[name][1], entries[name][0], name)
        for name, begin in zip(order, ends, strict=False)
    }
    return Layout(path, len(text).to_bytes(8, "little") + text, tensors, start + ends[-1])
