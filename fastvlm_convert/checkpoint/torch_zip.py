"""Read the tensors of a `pytorch_model.bin` without torch and without running code.

Since torch 1.6 the file is a zip archive: `NAME/data.pkl` describes the tensors, `NAME/data/KEY` holds the
bytes of each storage. A pickle may name any Python callable; the unpickler below knows the handful that
describe tensors and refuses all others before anything is called.
"""

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, NoReturn

import numpy as np

from fastvlm_convert.errors import CheckpointError, shortened, shown
from fastvlm_convert.regular_file import open_file
from fastvlm_convert.weights.file_kind import HEAD_BYTES, refuse_file
from fastvlm_convert.weights.file_tensors import (
    AGAIN,
    FileTensor,
    check_shape,
    file_size,
    item_size,
    read_bytes,
)
from fastvlm_convert.weights.source import Weight

_STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip

# A tensor takes some 200 bytes of the pickle and 100 of the archive's directory; FastVLM has 1300 at most.
MAX_PICKLE_BYTES = 4 << 20
MAX_DIRECTORY_BYTES = 4 << 20
_MAX_KEY = 200  # characters of a tensor's name in a message

# What torch.save writes, in any protocol of pickle. The others call, copy or allocate what a file asks for.
_OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1",
    "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST",
    "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET",
    "LONG_BINGET", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID",
))  # fmt: skip
_HOW_TO_SAVE = "save the state dict alone: torch.save(model.state_dict(), FILE), or as safetensors"


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


class _Mapping(dict[Any, Any]):
    """An OrderedDict that takes neither content nor attributes from the pickle's calls."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        """Modules put their versions here."""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Mapping,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _TensorUnpickler(pickle._Unpickler):
    """Unpickles descriptions of tensors and nothing else.

    It derives from the unpickler in Python: the one in C allocates whatever memo size a damaged file names.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {**pickle._Unpickler.dispatch}

    def load_setitem(self) -> None:
        """Only plain keys: to hash tuples nested in each other may take for ever."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def load_setitems(self) -> None:
        """The same of many."""
        items = self.pop_mark()  # type: ignore[attr-defined]
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: object, value: object) -> None:
        if not isinstance(key, str | int) or not isinstance(self.stack[-1], dict):
            raise pickle.UnpicklingError(f"it has the key {shown(key)}, expected a text")
        self.stack[-1][key] = value

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        if (module, name) not in _ALLOWED:
            what = shortened(f"{module}.{name}", _MAX_KEY)
            raise pickle.UnpicklingError(f"it refers to '{what}', which describes no tensor")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", str(dtype), str(key), str(), int(elements)) if dtype in _STORAGES.values():
                return _Storage(dtype, key, elements)
        raise pickle.UnpicklingError(f"unknown storage {shown(pid)}")


def read_torch_zip(path: Path) -> dict[str, Weight]:
    """The tensors of one file.

    Raises:
        CheckpointError: The file is no such archive, is truncated, is of the legacy format, or its
            pickle refers to anything but tensors.
    """
    file_size(path)
    head = read_bytes(path, 0, HEAD_BYTES)
    if head[:2] != b"PK":
        _refuse_other_format(head, path)
    try:
        with open_file(path) as file:
            _check_directory(file, path)
            with zipfile.ZipFile(file) as archive:
                members = {info.filename: info for info in archive.infolist()}
                root, pickled = _read_pickle(archive, members, path)
                order = _byte_order(archive, members.get(f"{root}byteorder"))
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=path, hint=AGAIN) from error
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, OverflowError, struct.error) as error:
        raise CheckpointError(f"damaged archive: {error}", where=path, hint=AGAIN) from error
    if order != b"little":
        raise CheckpointError(
            "it was saved by a machine that stores the high byte of a number first",
            where=path,
            hint="load it with torch and save it as safetensors, which are the same everywhere",
        )
    tensors = _unpickle(pickled, path)
    return {name: _to_weight(name, tensor, members, root, path) for name, tensor in tensors.items()}


def _refuse_other_format(head: bytes, path: Path) -> NoReturn:
    if head[:1] == b"\x80":  # a bare pickle: torch.save before 1.6
        raise CheckpointError(
            "this is torch's legacy format, which cannot be read without running code from it",
            where=path,
            hint="in a trusted environment: torch.save(torch.load(FILE, weights_only=True), FILE)",
        )
    refuse_file(head, "a torch checkpoint, neither a zip archive nor a pickle", path)


def _check_directory(file: BinaryIO, path: Path) -> None:
    """Before the list of members is read, an object of memory for each."""
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # as ZipFile itself finds it
    size = end[zipfile._ECD_SIZE] if end else 0  # type: ignore[attr-defined]
    if size > MAX_DIRECTORY_BYTES:
        what = f"its archive lists {size} bytes of members; a state dict's needs far less"
        raise CheckpointError(what, where=path, hint=AGAIN)


def _read_pickle(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], path: Path
) -> tuple[str, bytes]:
    names = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1:
        what = "not a torch checkpoint: the archive has no data.pkl"
        raise CheckpointError(what, where=path, hint=_HOW_TO_SAVE)
    info = members[names[0]]
    if info.file_size > MAX_PICKLE_BYTES or info.compress_type != zipfile.ZIP_STORED:
        what = "its data.pkl is absurdly large, or compressed"
        raise CheckpointError(what, where=path, hint=_HOW_TO_SAVE)
    return names[0].removesuffix("data.pkl"), archive.read(names[0])


def _byte_order(archive: zipfile.ZipFile, info: zipfile.ZipInfo | None) -> bytes:
    if info is None:  # torch before 2.1
        return b"little"
    if info.file_size > 16 or info.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile("its byteorder is no word")
    return archive.read(info)


def _unpickle(pickled: bytes, path: Path) -> dict[str, _Tensor]:
    try:
        for opcode, _, _ in pickletools.genops(pickled):
            _check_opcode(opcode.name)
        value = _TensorUnpickler(io.BytesIO(pickled)).load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"refused to read its pickle: {error}",
            where=path,
            hint=_HOW_TO_SAVE,
        ) from error
    except (
        AttributeError, EOFError, ImportError, IndexError, KeyError, MemoryError, OverflowError,
        RecursionError, TypeError, UnicodeDecodeError, ValueError, struct.error,
    ) as error:  # fmt: skip
        # A damaged pickle fails in whatever opcode it reaches; these are the kinds the module raises.
        raise CheckpointError("damaged pickle", where=path, hint=AGAIN) from error
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if isinstance(value, dict) and isinstance(value.get("module"), dict):  # DeepSpeed's, with other things
        value = {f"module.{name}": tensor for name, tensor in value["module"].items()}
    if not isinstance(value, dict):
        raise CheckpointError("its pickle holds no dictionary of tensors", where=path, hint=_HOW_TO_SAVE)
    return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, _Tensor)}


def _check_opcode(name: str) -> None:
    if name not in _OPCODES:
        raise pickle.UnpicklingError(f"it uses {name}, which describes no tensor")


def _to_weight(
    name: str, tensor: _Tensor, members: dict[str, zipfile.ZipInfo], root: str, path: Path
) -> Weight:
    shape = check_shape(tensor.shape, name, path)
    info = members.get(f"{root}data/{tensor.storage.key}")
    size = item_size(tensor.storage.dtype)
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        what = f"tensor '{shortened(name, _MAX_KEY)}' has no (uncompressed) bytes in the archive"
        raise CheckpointError(what, where=path, hint=_HOW_TO_SAVE)
    if not all(type(n) is int and n >= 0 for n in (tensor.first, *tensor.strides)):
        what = f"tensor '{shortened(name, _MAX_KEY)}' has impossible strides"
        raise CheckpointError(what, where=path, hint=AGAIN)
    last = sum((n - 1) * step for n, step in zip(shape, tensor.strides, strict=True))
    if 0 not in shape and (tensor.first + last + 1) * size > info.file_size:
        what = f"tensor '{shortened(name, _MAX_KEY)}' reaches outside its storage"
        raise CheckpointError(what, where=path, hint=AGAIN)
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
        raise CheckpointError("damaged archive: a local header is missing", where=path, hint=AGAIN)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return offset + 30 + int(name_length) + int(extra_length)
