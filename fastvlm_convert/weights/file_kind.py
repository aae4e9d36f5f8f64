"""What a file is that should hold weights and does not: told from its first bytes."""

from pathlib import Path
from typing import Final, NoReturn

from fastvlm_convert.errors import CheckpointError

HEAD_BYTES: Final = 64
_DOWNLOAD = "download it again; some models need a login first (hf auth login)"
_UNPACK = "unpack it first"

# First bytes -> what such a file is, and what to do.
_KINDS: Final = (
    (b"version https://git-lfs", "a Git LFS pointer, which stands for weights that were not fetched",
     "run `git lfs pull` in the clone, or download the file again"),
    (b"<!doctype html", "a web page that was saved in place of the weights", _DOWNLOAD),
    (b"<html", "a web page that was saved in place of the weights", _DOWNLOAD),
    (b"<?xml", "an XML document that was saved in place of the weights", _DOWNLOAD),
    (b"{", "JSON, not weights", _DOWNLOAD),
    (b"gguf", "a GGUF file, which llama.cpp reads",
     "give the checkpoint it was converted from; GGUF has other names, and often integers"),
    (b"pk\x03\x04", "a zip archive as torch.save writes it", "name it pytorch_model.bin"),
    (b"\x80", "a pickle as torch.save wrote it until 1.6, which cannot be read without running code from it",
     "in a trusted environment: torch.save(torch.load(FILE, weights_only=True), 'pytorch_model.bin')"),
    (b"\x93numpy", "a numpy array", "give the checkpoint as safetensors"),
    (b"\x89hdf", "an HDF5 file, as TensorFlow writes it", "give PyTorch's weights"),
    (b"\x1f\x8b", "compressed with gzip", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK),
)  # fmt: skip


def refuse_file(head: bytes, expected: str, path: Path) -> NoReturn:
    """The error for a file of another kind.

    Args:
        head: Its first bytes.
        expected: What it should be: `a safetensors file`.
        path: The file.

    Raises:
        CheckpointError: Always.
    """
    if not head:
        raise CheckpointError(f"not {expected}: it is empty", where=path, hint=_DOWNLOAD)
    begin = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, what, hint in _KINDS:
        if begin.startswith(start) or head.startswith(start):
            raise CheckpointError(f"not {expected}: it is {what}", where=path, hint=hint)
    if head[8:9] == b"{":
        raise CheckpointError(
            f"not {expected}: it is a safetensors file", where=path, hint="name it model.safetensors"
        )
    raise CheckpointError(
        f"not {expected}", where=path, hint="download it again (after a git clone: git lfs pull)"
    )
