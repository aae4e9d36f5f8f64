"""Pack a bundle for a store, or into one file, in the layout that the store's own tools read."""

import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile, ZipFile

from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.bundle.contents import unlisted
from fastvlm_convert.bundle.folder import Kind, Say, check_apart, new_folder
from fastvlm_convert.dataclass_io import has_schema
from fastvlm_convert.delivery.background_assets import background_assets_files
from fastvlm_convert.delivery.check import require_sound
from fastvlm_convert.delivery.play import play_files
from fastvlm_convert.delivery.stores import STORES, Destination, StoreFit, files_for, store_fit
from fastvlm_convert.delivery.zip_file import write_zip
from fastvlm_convert.errors import BundleError, OutputError
from fastvlm_convert.json_file import read_json_file
from fastvlm_convert.manifest import BESIDE, FILE_NAME, Manifest, load_manifest
from fastvlm_convert.progress import OnShare, OnStage, ignore_stage
from fastvlm_convert.regular_file import open_file
from fastvlm_convert.verification.record import manifest_hash

PACK_FILE: Final = "fastvlm_pack.json"  # by which an output is known as one that may be replaced
SCHEMA: Final = "fastvlm-convert/pack"
_CHUNK: Final = 1 << 20


@dataclass(frozen=True)
class PackResult:
    """What was packed.

    Attributes:
        output: The folder, or the zip file.
        files: Bytes of every file in it, by its path relative to the output; of a zip, of the entries.
        fit: What the store counts; None for a zip.
    """

    output: Path
    files: dict[str, int]
    fit: StoreFit | None


def pack(
    bundle: Path,
    destination: Destination,
    output: Path,
    overwrite: bool = False,
    say: Say = lambda note: None,
    on_progress: OnStage = ignore_stage,
) -> PackResult:
    """Pack a bundle, after every file in it was checked.

    Args:
        bundle: Its folder.
        destination: What for.
        output: Folder to make; for `zip` a file.
        overwrite: Whether an output that this function made may be replaced.
        say: Called with what the user should know.
        on_progress: Called with what is being done and the share of it that is done, 0..1.

    Raises:
        BundleError: The bundle is damaged, or does not fit the store.
        OutputError: The output exists or cannot be written.
    """
    require_sound(bundle, on_progress)
    manifest = load_manifest(bundle)
    if destination == "zip":
        return _pack_zip(bundle, manifest, output, overwrite, on_progress)
    store = STORES[destination]
    beside = {
        name: (bundle / name).stat().st_size for name in (FILE_NAME, *BESIDE) if (bundle / name).exists()
    }
    sizes = {**{name: entry.size for name, entry in manifest.files.items()}, **beside}
    files = files_for(store, sizes, manifest.artifacts)
    fit = store_fit(store, files, manifest.artifacts, lambda names: _deflated([bundle / n for n in names]))
    if not fit.fits:
        raise BundleError(f"it does not fit {store.title}: {fit.reason}", where=bundle, hint=_SMALLER)
    layout = play_files if destination == "play" else background_assets_files
    made, copied = layout(_pack_name(manifest.recipe.name), fit)
    made[PACK_FILE] = _pack_json(bundle, fit, sorted({*made, *copied}))
    with new_folder(output, overwrite, [bundle], say, _KIND) as folder:
        _copy_all(bundle, folder, made, copied, partial(on_progress, "packing"))
    sizes = {name: len(content) for name, content in made.items()}
    sizes |= {name: files[source] for name, source in copied.items()}
    return PackResult(output, dict(sorted(sizes.items())), fit)


_SMALLER: Final = "export with a recipe that makes smaller files; `fastvlm-convert recipes` lists sizes"


def _pack_name(recipe: str) -> str:
    """A name that AI packs may have: letters, digits and underscores, a letter first."""
    return f"fastvlm_{re.sub('[^A-Za-z0-9]', '_', recipe)}"


def _pack_json(bundle: Path, fit: StoreFit, files: Sequence[str]) -> bytes:
    value: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": 1,
        "for": fit.store.name,
        "manifest_sha256": manifest_hash(bundle),
        "packs": [asdict(pack) for pack in fit.packs],
        "files": list(files),
    }
    return (json.dumps(value, indent=2) + "\n").encode()


def _strays(folder: Path) -> list[str]:
    """What lies in an output that this tool did not put there."""
    try:
        files = read_json_file(folder / PACK_FILE).get("files")
    except (OSError, ValueError, AttributeError):
        files = None
    return unlisted(folder, {PACK_FILE, *(files if isinstance(files, list) else ())})


_KIND: Final = Kind("pack", lambda folder: has_schema(folder / PACK_FILE, SCHEMA), _strays)


def _copy_all(
    bundle: Path,
    folder: Path,
    made: dict[str, bytes],
    copied: dict[str, str],
    on_share: OnShare,
) -> None:
    total = sum((bundle / source).stat().st_size for source in copied.values()) or 1
    done = 0
    for name, content in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name, source in copied.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open_file(bundle / source) as stream, (folder / name).open("xb") as sink:
            while piece := stream.read(_CHUNK):
                sink.write(piece)
                done += len(piece)
                on_share(done / total)


def _deflated(paths: Sequence[Path]) -> int:
    """Bytes of files after compression as a store may do it: deflate, each file for itself."""
    total = 0
    for path in paths:
        deflater = zlib.compressobj()
        with open_file(path) as stream:
            while piece := stream.read(_CHUNK):
                total += len(deflater.compress(piece))
        total += len(deflater.flush())
    return total


def _pack_zip(
    bundle: Path, manifest: Manifest, output: Path, overwrite: bool, on_progress: OnStage
) -> PackResult:
    check_apart(output, [bundle])
    _check_file(output, overwrite)
    names = [FILE_NAME, *manifest.files, *(name for name in BESIDE if (bundle / name).exists())]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(output) as unfinished:
            write_zip({name: bundle / name for name in names}, unfinished, partial(on_progress, "packing"))
    except OSError as error:
        hint = "see that there is room and that you may write there"
        raise OutputError(f"cannot write: {error.strerror}", where=output, hint=hint) from error
    return PackResult(output, {name: (bundle / name).stat().st_size for name in sorted(names)}, None)


def _check_file(output: Path, overwrite: bool) -> None:
    """See that a zip may be written here: nothing is there, or a bundle's zip that may be replaced."""
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_file():
        what = "a link" if output.is_symlink() else "a folder" if output.is_dir() else "no plain file"
        raise OutputError(f"the output is {what}", where=output, hint="give the name of a file to make")
    if not overwrite:
        raise OutputError("the output exists", where=output, hint="add --overwrite to replace it")
    try:
        with ZipFile(output) as archive:
            is_ours = FILE_NAME in archive.namelist()
    except (BadZipFile, OSError):
        is_ours = False
    if not is_ours:
        what = "the output is no zip file of a bundle, so --overwrite does not replace it"
        raise OutputError(what, where=output, hint="delete it yourself, or choose another name")
