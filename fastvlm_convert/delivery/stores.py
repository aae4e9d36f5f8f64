"""What stores take, from the figures that they publish (docs/delivery.md cites them), and what fits."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from fastvlm_convert.errors import BundleError
from fastvlm_convert.exporters.backends import backend_of
from fastvlm_convert.manifest import Artifact
from fastvlm_convert.targets import BACKENDS, Target

Destination = Literal["play", "background-assets", "zip"]
StoreName = Literal["play", "background-assets"]


@dataclass(frozen=True)
class Store:
    """A way that a store delivers large files beside an app.

    Attributes:
        name: As users type it.
        title: As its makers call it.
        max_pack_bytes: Download of one pack; None where no limit is published.
        max_app_bytes: Downloads of all packs of an app together.
    """

    name: StoreName
    title: str
    max_pack_bytes: int | None
    max_app_bytes: int

    @property
    def targets(self) -> tuple[Target, ...]:
        """Formats that its devices run."""
        return tuple(target for target in BACKENDS if backend_of(target).store == self.name)


STORES: Final[dict[StoreName, Store]] = {
    store.name: store
    for store in (
        Store("play", "Play for On-device AI", 1_500_000_000, 4_000_000_000),
        Store("background-assets", "Apple-hosted Background Assets", None, 200_000_000_000),
    )
}


@dataclass(frozen=True)
class Pack:
    """Files that are downloaded together.

    Attributes:
        files: Paths relative to the bundle.
        num_bytes: Their size.
        download_bytes: The most that the store counts of it: the size, or less where it was compressed.
    """

    files: tuple[str, ...]
    num_bytes: int
    download_bytes: int


@dataclass(frozen=True)
class StoreFit:
    """Whether a bundle fits a store.

    Attributes:
        store: The store.
        packs: Into what it is divided.
        fits: None where only compressed sizes can tell, and they are not known.
        reason: Why it does not fit, or what is not known; else None.
    """

    store: Store
    packs: tuple[Pack, ...]
    fits: bool | None
    reason: str | None

    @property
    def download_bytes(self) -> int:
        """Of all packs."""
        return sum(pack.download_bytes for pack in self.packs)


def files_for(store: Store, sizes: Mapping[str, int], artifacts: Sequence[Artifact]) -> dict[str, int]:
    """The files that a store's devices need: not those of other formats.

    Args:
        store: The store.
        sizes: Bytes of every file of the bundle.
        artifacts: What is in it.

    Raises:
        BundleError: The bundle has nothing that they could run.
    """
    own = [a for a in artifacts if a.target in store.targets]
    if not own:
        raise BundleError(
            f"the bundle has no artifact that {store.title} could deliver",
            hint=f"export one with {' or '.join(f'--target {target}' for target in store.targets)}",
        )
    others = {a.target for a in artifacts} - set(store.targets)
    foreign = {file for a in artifacts if a.target in others for file in a.files}
    folders = {folder for target in others for folder in backend_of(target).folders}
    folders -= {folder for a in own for folder in backend_of(a.target).folders}
    return {
        name: size
        for name, size in sizes.items()
        if name not in foreign and name.partition("/")[0] not in folders
    }


def _top_folders(files: Iterable[str]) -> set[str]:
    return {file.partition("/")[0] for file in files if "/" in file}


def store_fit(
    store: Store,
    files: Mapping[str, int],
    artifacts: Sequence[Artifact],
    compressed: Callable[[Sequence[str]], int] | None = None,
) -> StoreFit:
    """Divide files into packs that a store takes.

    Graphs and the data they read stay together. A pack counts with its size where that fits: what is
    downloaded is at most as large. Only beyond that it matters how far files can be compressed.

    Args:
        store: The store.
        files: Bytes of the files to deliver.
        artifacts: What is in them.
        compressed: Bytes of files after compression; None where they do not exist yet.
    """
    groups = _groups(files, artifacts)
    limit = store.max_pack_bytes
    packs: list[Pack] = []
    for group in groups:
        size = sum(files[name] for name in group)
        is_large = limit is not None and size > limit
        packs.append(Pack(group, size, compressed(group) if is_large and compressed else size))
    if compressed is not None and sum(pack.download_bytes for pack in packs) > store.max_app_bytes:
        packs = [Pack(pack.files, pack.num_bytes, compressed(pack.files)) for pack in packs]
    packs = _filled(packs, limit)
    problem = _problem(store, packs)
    if problem is None:
        return StoreFit(store, tuple(packs), True, None)
    if compressed is None:
        return StoreFit(
            store, tuple(packs), None, f"{problem} before compression, which `bundle pack` measures"
        )
    return StoreFit(store, tuple(packs), False, problem)


def _problem(store: Store, packs: Sequence[Pack]) -> str | None:
    limit = store.max_pack_bytes
    for pack in packs:
        if limit is not None and pack.download_bytes > limit:
            largest = max(pack.files, key=lambda name: (name.endswith(("_data", ".bin")), name))
            return f"the pack with {largest} has {pack.download_bytes:,} bytes, {limit:,} are allowed"
    total = sum(pack.download_bytes for pack in packs)
    if total > store.max_app_bytes:
        return f"the packs have {total:,} bytes together, {store.max_app_bytes:,} are allowed"
    return None


def _groups(files: Mapping[str, int], artifacts: Sequence[Artifact]) -> list[tuple[str, ...]]:
    """Files that a runtime opens together, each once; first those that belong to no artifact."""
    groups: list[set[str]] = []
    for artifact in artifacts:
        merged = {file for file in artifact.files if file in files}
        if merged:
            groups, touched = [g for g in groups if not g & merged], [g for g in groups if g & merged]
            groups.append(merged.union(*touched))
    rest = set(files).difference(*groups)
    return [tuple(sorted(group)) for group in (rest, *groups) if group]


def _filled(packs: Sequence[Pack], limit: int | None) -> list[Pack]:
    """Fewer packs: each is added to the first that has room."""
    filled: list[Pack] = []
    for pack in packs:
        for n, other in enumerate(filled):
            if limit is None or other.download_bytes + pack.download_bytes <= limit:
                filled[n] = Pack(
                    tuple(sorted((*other.files, *pack.files))),
                    other.num_bytes + pack.num_bytes,
                    other.download_bytes + pack.download_bytes,
                )
                break
        else:
            filled.append(pack)
    return filled
