"""Tensors that are stored more than once."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from fastvlm_convert.lint.facts import Region, Tensor
from fastvlm_convert.regular_file import open_file

_MIN_BYTES: Final = 1 << 14  # biases and norms repeat by nature and cost nothing
_NUMBERS: Final = ("int32", "int64")  # positions and shapes, of which each function has its own
_SAMPLE: Final = 1 << 12
_PIECE: Final = 1 << 20


def duplicates(bundle: Path, tensors: Iterable[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """Groups of tensors with the same bytes in different places, the largest first.

    A tensor that begins with all of another belongs to its group: an embedding often has rows for more tokens
    than the head. Files are read as far as needed: samples first, whole tensors only where these agree.

    Raises:
        OSError: A file cannot be read.
    """
    alike: dict[bytes, list[Tensor]] = defaultdict(list)
    for tensor in _apart(tensors):
        is_weight = tensor.dtype not in _NUMBERS
        if is_weight and tensor.region is not None and tensor.region.length >= _MIN_BYTES:
            alike[_digest(bundle, tensor.region, _SAMPLE)].append(tensor)
    groups = [group for beginning in alike.values() for group in _equal(bundle, beginning)]
    return tuple(sorted(groups, key=lambda group: (-shared_bytes(group), group[0].name)))


def _apart(tensors: Iterable[Tensor]) -> list[Tensor]:
    """One tensor for each place: the same bytes may have several names, and a head reads part of a table."""
    places: dict[tuple[str, int], Tensor] = {}
    for tensor in tensors:
        if tensor.region is not None:
            places.setdefault((tensor.region.file, tensor.region.offset), tensor)
    return list(places.values())


def shared_bytes(group: Sequence[Tensor]) -> int:
    """What each tensor of a group has in common with the others."""
    return min(t.region.length for t in group if t.region is not None)


def _equal(bundle: Path, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Groups of tensors among some that begin alike, the shortest of a group being the beginning of all."""
    left = sorted(tensors, key=lambda tensor: shared_bytes([tensor]))
    while len(left) > 1:
        length = shared_bytes(left)
        digests = [_digest(bundle, t.region, length) for t in left if t.region is not None]
        same = [t for t, digest in zip(left, digests, strict=True) if digest == digests[0]]
        if len(same) > 1:
            yield tuple(same)
        left = [t for t in left if t not in same]


def _digest(bundle: Path, region: Region, length: int) -> bytes:
    """Hash of the first bytes of a tensor."""
    digest = hashlib.blake2b()
    with open_file(bundle / region.file) as file:
        file.seek(region.offset)
        while length > 0 and (piece := file.read(min(length, _PIECE))):
            digest.update(piece)
            length -= len(piece)
    return digest.digest()
