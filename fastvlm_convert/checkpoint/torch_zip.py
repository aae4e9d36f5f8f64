"""Read the tensors of a `pytorch_model.bin` without torch and without running code.

Since torch 1.6 the file is a zip archive: `NAME/data.pkl` describes the tensors, `NAME/data/KEY` holds the
bytes of each storage. A pickle may name any Python callable; the unpickler below knows the handful that
describe tensors and refuses all others before anything is called.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.weights.file_tensors import FileTensor, check_shape, file_size, item_size, read_bytes
from fastvlm_convert.weights.source import Weight

_STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip

MAX_PICKLE_BYTES = 64 << 20


# Named tuples, because a pickle could change the fields of an ordinary object after it was checked.


class _Storage(NamedTuple):
    dtype: str
    key: str
    elements: int


class _Tensor(NamedTuple):
    storage: _Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: object, first: object, shape: object, strides: object, *_: object) -> _Tensor:
    if not (isinstance(storage, _Storage) and isinstance(first, int)):
        raise pickle.UnpicklingError("malformed tensor")
    if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)):
        raise pickle.UnpicklingError("malformed tensor shape")
    return _Tensor(storage, first, shape, strides)


def _rebuild_parameter(tensor: object, *_: object) -> object:
    return tensor


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _TensorUnpickler(pickle._Unpickler):
    """Unpickles descriptions of tensors and nothing else.

    It derives from the unpickler in Python: the one in C allocates whatever memo size a damaged file names.
    """

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to '{module}.{name}', which describes no tensor")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", str(dtype), str(key), str(), int(elements)) if dtype in _STORAGES.values():
                return _Storage(dtype, key, elements)
        raise pickle.UnpicklingError(f"unknown storage {pid!r}")


def read_torch_zip(path: Path) -> dict[str, Weight]:
    """The tensors of one file.

    Raises:
        CheckpointError: The file is no such archive, is truncated, is of the legacy format, or its
            pickle refers to anything but tensors.
    """
    file_size(path)
    head = read_bytes(path, 0, 2)
    if head != b"PK":
        _refuse_other_format(head, path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            root, pickled = _read_pickle(archive, members, path)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"damaged archive: {error}", where=path) from error
    tensors = _unpickle(pickled, path)
    return {name: _to_weight(name, tensor, members, root, path) for name, tensor in tensors.items()}


def _refuse_other_format(head: bytes, path: Path) -> NoReturn:
    if head[:1] == b"\x80":  # a bare pickle: torch.save before 1.6
        raise CheckpointError(
            "this is torch's legacy format, which cannot be read without running code from it",
            where=path,
            hint="in a trusted environment: torch.save(torch.load(FILE, weights_only=True), FILE)",
        )
    raise CheckpointError("not a torch checkpoint: neither a zip archive nor a pickle", where=path)


def _read_pickle(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], path: Path
) -> tuple[str, bytes]:
    names = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1:
        raise CheckpointError("not a torch checkpoint: the archive has no data.pkl", where=path)
    info = members[names[0]]
    if info.file_size > MAX_PICKLE_BYTES or info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError("its data.pkl is absurdly large, or compressed", where=path)
    return names[0].removesuffix("data.pkl"), archive.read(names[0])


def _unpickle(pickled: bytes, path: Path) -> dict[str, _Tensor]:
    try:
        value = _TensorUnpickler(io.BytesIO(pickled)).load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"refused to read its pickle: {error}",
            where=path,
            hint="save the state dict alone: torch.save(model.state_dict(), FILE), or as safetensors",
        ) from error
    except (
        AttributeError, EOFError, ImportError, IndexError, KeyError, MemoryError, OverflowError,
        RecursionError, TypeError, UnicodeDecodeError, ValueError, struct.error,
    ) as error:  # fmt: skip
        # A damaged pickle fails in whatever opcode it reaches; these are the kinds the module raises.
        raise CheckpointError(f"damaged pickle: {type(error).__name__}", where=path) from error
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise CheckpointError("its pickle holds no dictionary of tensors", where=path)
    return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, _Tensor)}


def _to_weight(
    name: str, tensor: _Tensor, members: dict[str, zipfile.ZipInfo], root: str, path: Path
) -> Weight:
    shape = check_shape(tensor.shape, name, path)
    info = members.get(f"{root}data/{tensor.storage.key}")
    size = item_size(tensor.storage.dtype)
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"tensor '{name}' has no (uncompressed) bytes in the archive", where=path)
    if not all(type(n) is int and n >= 0 for n in (tensor.first, *tensor.strides)):
        raise CheckpointError(f"tensor '{name}' has impossible strides", where=path)
    last = sum((n - 1) * step for n, step in zip(shape, tensor.strides, strict=True))
    if 0 not in shape and (tensor.first + last + 1) * size > info.file_size:
        raise CheckpointError(f"tensor '{name}' reaches outside its storage", where=path)
    start = _data_offset(path, info)
    if 0 in shape or tensor.strides == _contiguous(shape):
        return FileTensor(path, start + tensor.first * size, shape, tensor.storage.dtype, name).weight()
    flat = FileTensor(path, start + tensor.first * size, (last + 1,), tensor.storage.dtype, name).weight()
    steps = tuple(4 * step for step in tensor.strides)

    def read(first: int, stop: int) -> np.ndarray:
        whole = np.lib.stride_tricks.as_strided(flat.array(), shape, steps)
        return np.ascontiguousarray(whole[first:stop])

    return Weight(shape, tensor.storage.dtype, read)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Offset of a member's bytes: its local header repeats name and extra field, of lengths of its own."""
    offset = int(info.header_offset)
    header = read_bytes(path, offset, 30) if 0 <= offset < file_size(path) else b""
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError("damaged archive: a local header is missing", where=path)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return offset + 30 + int(name_length) + int(extra_length)
