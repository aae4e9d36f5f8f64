"""Read the header of a safetensors file.

Format: https://huggingface.co/docs/safetensors: an unsigned 64-bit header length, a JSON header of
name -> {dtype, shape, data_offsets}, the tensors. The `safetensors` package maps files into memory,
which counts against the memory budget and has no bfloat16 for numpy; the header is all we need.
"""

import json
from pathlib import Path

from fastvlm_convert.checkpoint.files import (
    check_shape,
    file_size,
    file_weight,
    item_size,
    read_bytes,
)
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.weights.source import Weight

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, Weight]:
    """The tensors of one file.

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
    weights = {}
    for name, entry in header.items():
        dtype, shape, begin, end = _parse_entry(name, entry, path)
        expected = item_size(dtype)
        for n in shape:
            expected *= n
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
        weights[name] = file_weight(path, start + begin, shape, dtype, name)
    return weights


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
