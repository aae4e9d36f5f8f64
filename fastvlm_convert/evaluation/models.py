"""What is evaluated: checkpoints and bundles, each target of a bundle a column of its own."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import BundleError, UsageError
from fastvlm_convert.manifest import FILE_NAME, chosen_target, load_manifest
from fastvlm_convert.progress import OnShare
from fastvlm_convert.regular_file import open_file
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle, load_reference
from fastvlm_convert.targets import Target


@dataclass(frozen=True)
class Column:
    """A model to evaluate.

    Attributes:
        name: What people call it; no two columns' are the same.
        path: A checkpoint's folder or id, or a bundle's folder.
        target: Which of a bundle's targets; None for a checkpoint.
    """

    name: str
    path: Path
    target: Target | None


@dataclass(frozen=True)
class OpenColumn:
    """A model that can answer.

    Attributes:
        loaded: It.
        sha256: Hash of its files.
        notes: What the user should know of it.
    """

    loaded: LoadedModel
    sha256: str
    notes: tuple[str, ...]


def columns_of(models: Sequence[Path], targets: Sequence[Target] = ()) -> list[Column]:
    """The columns that some models make.

    Args:
        models: Checkpoints and bundles.
        targets: The targets of bundles to run; a bundle's first if there are none.

    Raises:
        BundleError: A bundle is damaged, or lacks a target.
        UsageError: A model is given twice, or targets and no bundle.
    """
    found: list[Column] = []
    for path in models:
        if (path / FILE_NAME).is_file():
            manifest = load_manifest(path)
            chosen = [chosen_target(manifest, target, path) for target in targets or (None,)]
            found += [Column(f"{path.resolve().name} {target}", path, target) for target in chosen]
        else:
            found.append(Column(path.resolve().name, path, None))
    if targets and all(column.target is None for column in found):
        raise UsageError(
            "--target chooses among a bundle's targets, and there is no bundle", hint="leave it out"
        )
    twice = [c for c, count in Counter((c.path.resolve(), c.target) for c in found).items() if count > 1]
    if twice:
        raise UsageError(f"{twice[0][0]} is given twice", hint="give every model once")
    names = Counter(column.name for column in found)
    return [c if names[c.name] == 1 else replace(c, name=_long_name(c)) for c in found]


def open_column(column: Column, on_progress: OnShare) -> OpenColumn:
    """Load a model.

    Raises:
        ConversionError: It is missing, damaged, or its runtime is not installed or refuses it.
    """
    if column.target is None:
        checkpoint = open_checkpoint(column.path)
        loaded = load_reference(checkpoint, on_progress=on_progress)
        return OpenColumn(loaded, checkpoint.sha256, checkpoint.notes)
    return OpenColumn(load_bundle(column.path, column.target), bundle_hash(column.path), ())


def bundle_hash(bundle: Path) -> str:
    """SHA-256 over the names and contents of a bundle's files, as they are and not as the manifest says.

    Raises:
        BundleError: One cannot be read.
    """
    total = hashlib.sha256()
    for name in (FILE_NAME, *load_manifest(bundle).files):
        try:
            with open_file(bundle / name) as file:
                digest = hashlib.file_digest(file, "sha256")
        except OSError as error:
            raise BundleError(f"cannot read: {error.strerror}", where=bundle / name) from error
        total.update(f"{name}\0{digest.hexdigest()}\n".encode())
    return total.hexdigest()


def _long_name(column: Column) -> str:
    return str(column.path) if column.target is None else f"{column.path} {column.target}"
