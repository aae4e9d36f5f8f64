"""Find the files that hold a checkpoint's weights, and see where their tensors lie."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, NoReturn, TypeVar

from fastvlm_convert.checkpoint.files import read_json
from fastvlm_convert.checkpoint.foreign import refuse_other_folders
from fastvlm_convert.checkpoint.layouts import APPLE_VISION, TIMM_VISION
from fastvlm_convert.checkpoint.torch_zip import read_torch_zip
from fastvlm_convert.errors import CheckpointError, shortened
from fastvlm_convert.regular_file import is_there
from fastvlm_convert.weights.safetensors_file import read_safetensors
from fastvlm_convert.weights.source import Weight

T = TypeVar("T")
Reader = Callable[[Path], dict[str, T]]
FLOAT_READERS: Final[Mapping[str, Reader[Weight]]] = {
    "model.safetensors": read_safetensors,
    "pytorch_model.bin": read_torch_zip,
}
# What training tools put before every name.
_WRAPPERS: Final = ("module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module.")
_AGAIN: Final = "download or copy the folder again"


@dataclass(frozen=True)
class StoredTensors(Generic[T]):
    """What was found.

    Attributes:
        tensors: By stored name.
        files: Every file that was read.
        notes: What was odd.
    """

    tensors: dict[str, T]
    files: list[Path]
    notes: tuple[str, ...] = ()


def read_tensors(path: Path, readers: Mapping[str, Reader[T]]) -> StoredTensors[T]:
    """The tensors of a checkpoint, in one file or in shards.

    Args:
        path: The checkpoint's folder.
        readers: Name of the file that may hold everything -> what reads such a file; the first that is there
            counts.

    Raises:
        CheckpointError: There are none, a shard is missing, or a file is damaged or holds something else.
    """
    for name, reader in readers.items():
        if is_there(path / name):
            return StoredTensors(reader(path / name), [path / name])
        if is_there(path / f"{name}.index.json"):
            return _indexed(path, path / f"{name}.index.json", reader)
        if shards := _shards(path, name):
            return _unindexed(path, shards, reader)
    refuse_other_folders(path)
    raise CheckpointError(
        "no weights: neither " + ", ".join(readers) + " nor an index of shards is here",
        where=path,
        hint=_others(path),
    )


def _indexed(path: Path, index: Path, reader: Reader[T]) -> StoredTensors[T]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError("it has no weight_map of tensor names to file names", where=index, hint=_AGAIN)
    shards: dict[str, dict[str, T]] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"shard '{file}' lies outside the checkpoint's folder", where=index)
        shards[file] = reader(path / file)
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise CheckpointError(
                f"tensor '{name}' is not in '{file}', where the index has it", where=index, hint=_AGAIN
            )
    tensors = {name: weight for shard in shards.values() for name, weight in shard.items()}
    tensors |= {name: shards[file][name] for name, file in weight_map.items()}  # it decides between two
    return StoredTensors(tensors, [index, *(path / file for file in shards)])


def _shards(path: Path, name: str) -> dict[int, tuple[int, Path]]:
    """Number -> count and file of what `NAME-00001-of-00003.SUFFIX` names."""
    stem, suffix = name.split(".")
    pattern = re.compile(rf"{re.escape(stem)}-(\d{{5}})-of-(\d{{5}})\.{re.escape(suffix)}")
    matches = ((pattern.fullmatch(file.name), file) for file in sorted(path.iterdir()))
    return {int(match[1]): (int(match[2]), file) for match, file in matches if match}


def _unindexed(path: Path, shards: Mapping[int, tuple[int, Path]], reader: Reader[T]) -> StoredTensors[T]:
    """All shards where the index that should list them was lost: their names say how many there are."""
    counts = {count for count, _ in shards.values()}
    missing = sorted(set(range(1, max(counts) + 1)) - shards.keys())[:8]
    if len(counts) > 1 or missing:
        what = (
            f"shards {', '.join(map(str, missing))} of {max(counts)} are missing"
            if missing
            else ("its shards are of two checkpoints")
        )
        raise CheckpointError(f"{what}, and so is the index that lists them", where=path, hint=_AGAIN)
    tensors: dict[str, T] = {}
    for _, file in shards.values():
        found = reader(file)
        if twice := next(iter(found.keys() & tensors.keys()), None):
            raise CheckpointError(
                f"tensor '{twice}' is in two shards, and there is no index", where=path, hint=_AGAIN
            )
        tensors |= found
    note = "the index of the shards is missing; all that their names count are there and were read"
    return StoredTensors(tensors, [file for _, file in shards.values()], (note,))


def _others(path: Path) -> str:
    found = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    if not found:
        return _AGAIN
    return f"weights are read from files of these names; here is {', '.join(found[:4])}"


def without_wrappers(stored: StoredTensors[T]) -> StoredTensors[T]:
    """The same tensors without what training tools put before every name."""
    tensors, gone = stored.tensors, []
    while tensors:
        wrapper = next((w for w in _WRAPPERS if all(name.startswith(w) for name in tensors)), None)
        if wrapper is None:
            break
        gone.append(wrapper)
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    if (wrapper := _unknown_wrapper(tensors)) is not None:
        gone.append(wrapper)
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    if any("._orig_mod." in name for name in tensors):  # a part that was compiled by itself
        gone.append("_orig_mod.")
        tensors = {name.replace("._orig_mod.", "."): tensor for name, tensor in tensors.items()}
    if not gone:
        return stored
    note = f"every tensor's name begins with '{''.join(gone)}', which was left out"
    return StoredTensors(tensors, stored.files, (*stored.notes, note))


def _unknown_wrapper(names: Collection[str]) -> str | None:
    """What stands before all names, told by those of the encoder."""
    for name in names:
        for anchor in (APPLE_VISION, TIMM_VISION):
            before, found, _ = name.partition(f".{anchor}")
            if found and not before.startswith(anchor):
                return f"{before}." if all(n.startswith(f"{before}.") for n in names) else None
    return None


def refuse_empty(name: str, shape: tuple[int, ...], path: Path) -> NoReturn:
    """The error for a tensor that ZeRO-3 left empty.

    Raises:
        CheckpointError: Always.
    """
    raise CheckpointError(
        f"tensor '{shortened(name, 100)}' has shape {list(shape)}: DeepSpeed ZeRO-3 saved it without "
        "gathering its parts",
        where=path,
        hint="run `python zero_to_fp32.py . pytorch_model.bin` in the training folder, or save with "
        "stage3_gather_16bit_weights_on_model_save",
    )
