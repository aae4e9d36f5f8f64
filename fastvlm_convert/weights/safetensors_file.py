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
from fastvlm_convert.errors import CheckpointError, shortened, shown
from fastvlm_convert.json_file import parse_json
from fastvlm_convert.weights.file_kind import HEAD_BYTES, refuse_file
from fastvlm_convert.weights.file_tensors import (
    AGAIN,
    FileTensor,
    check_shape,
    file_size,
    item_size,
    numpy_dtype,
    read_bytes,
)
from fastvlm_convert.weights.source import Weight

MAX_HEADER_BYTES = 4 << 20  # FastVLM's take 0.2 MB; each byte of one may cost twenty of memory

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_WRITTEN = {code: dtype for dtype, code in _DTYPES.items()} | {"uint32": "U32"}


def read_safetensors(path: Path) -> dict[str, Weight]:
    """The tensors of one file, as weights.

    Raises:
        CheckpointError: As `read_header`.
    """
    return {name: tensor.weight() for name, tensor in read_header(path).items()}


def read_header(path: Path, *, packed: bool = False) -> dict[str, FileTensor]:
    """Where every tensor of a file lies.

    Args:
        path: The file.
        packed: Whether it may hold words of packed integers, which are no weights by themselves.

    Raises:
        CheckpointError: The file is no safetensors file, is truncated, or its header is inconsistent.
    """
    size = file_size(path)
    head = read_bytes(path, 0, HEAD_BYTES)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
        if head[8:9] == b"{":
            what = f"its header claims {shown(length)} bytes; the safetensors file is damaged"
            raise CheckpointError(what, where=path, hint=AGAIN)
        refuse_file(head, "a safetensors file", path)
    raw = read_bytes(path, 8, length)
    if len(raw) < length:
        raise CheckpointError("the safetensors header is truncated", where=path, hint=AGAIN)
    header = _parse_header(raw, path)
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {}
    known = _DTYPES | {code: dtype for dtype, code in _WRITTEN.items()} if packed else _DTYPES
    for name, entry in header.items():
        dtype, shape, begin, end = _parse_entry(name, entry, path, known)
        expected = num_elements(shape) * item_size(dtype)
        if begin < 0:
            what = f"tensor '{shortened(name, 100)}' starts at byte {shown(begin)}; the header is damaged"
            raise CheckpointError(what, where=path, hint=AGAIN)
        if end - begin != expected:
            raise CheckpointError(
                f"tensor '{shortened(name, 100)}' claims {shown(end - begin)} bytes, "
                f"but {list(shape)} of {dtype} need {expected}",
                where=path,
                hint=AGAIN,
            )
        if start + end > size:
            raise CheckpointError(
                f"tensor '{shortened(name, 100)}' ends at byte {start + end}, "
                f"the file has {size}: it is truncated",
                where=path,
                hint=AGAIN,
            )
        tensors[name] = FileTensor(path, start + begin, shape, dtype, name)
    _check_apart(tensors, path)
    end = max((t.offset + t.num_bytes for t in tensors.values()), default=start)
    if end < size:
        what = f"the file goes on for {size - end} bytes behind its last tensor; it is damaged"
        raise CheckpointError(what, where=path, hint=AGAIN)
    return tensors


def _check_apart(tensors: Mapping[str, FileTensor], path: Path) -> None:
    filled = [t for t in tensors.values() if t.num_bytes]
    for before, after in pairwise(sorted(filled, key=lambda t: t.offset)):
        if before.offset + before.num_bytes > after.offset:
            both = f"'{shortened(before.name, 100)}' and '{shortened(after.name, 100)}'"
            raise CheckpointError(f"tensors {both} overlap", where=path, hint=AGAIN)


def _parse_header(raw: bytes, path: Path) -> dict[str, object]:
    try:
        header = parse_json(raw)
    except ValueError as error:
        what = f"not a safetensors file: its header is no JSON: {error}"
        raise CheckpointError(what, where=path, hint=AGAIN) from error
    if not isinstance(header, dict):
        what = "not a safetensors file: its header is no JSON object"
        raise CheckpointError(what, where=path, hint=AGAIN)
    return header


def _parse_entry(
    name: str, entry: object, path: Path, dtypes: Mapping[str, str]
) -> tuple[str, tuple[int, ...], int, int]:
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if code not in dtypes:
                raise CheckpointError(
                    f"tensor '{shortened(name, 100)}' has dtype {shortened(code, 20)}; "
                    f"supported are {', '.join(dtypes)}",
                    where=path,
                    hint="such weights are quantized: give the unquantized checkpoint",
                )
            return dtypes[code], check_shape(shape, name, path), begin, end
    what = f"malformed header entry of tensor '{shortened(name, 100)}'"
    raise CheckpointError(what, where=path, hint=AGAIN)


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


def lay_out(path: Path, entries: Entries, metadata: Mapping[str, str] | None = None) -> Layout:
    """Decide where tensors lie: the widest dtypes first, so that all are aligned; else in the order given.

    Args:
        path: The file.
        entries: Its tensors; of dtypes that are read as weights, or uint32.
        metadata: What the header says of the file.
    """
    order = sorted(entries, key=lambda name: -item_size(entries[name][0]))
    ends = [0]
    for name in order:
        dtype, shape = entries[name]
        ends.append(ends[-1] + num_elements(shape) * item_size(dtype))
    content: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    content |= {
        name: {
            "dtype": _WRITTEN[entries[name][0]],
            "shape": list(entries[name][1]),
            "data_offsets": list(offsets),
        }
        for name, offsets in zip(order, pairwise(ends), strict=True)
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    tensors = {
        name: FileTensor(path, start + begin, entries[name][1], entries[name][0], name)
        for name, begin in zip(order, ends, strict=False)
    }
    return Layout(path, len(text).to_bytes(8, "little") + text, tensors, start + ends[-1])
