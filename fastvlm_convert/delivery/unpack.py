"""Unpack a bundle from a zip file that anybody may have made.

What the zip says is compared with the manifest in it before a byte is written: names, sizes, kinds of
entries. Nothing is written that the manifest does not list, no more bytes than it says, and a file whose hash
is another ends it. The folder appears whole or not at all.
"""

import hashlib
import shutil
import stat
import zlib
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Final
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from fastvlm_convert.bundle.folder import Say, new_folder
from fastvlm_convert.delivery.names import clashes, name_problem, quoted
from fastvlm_convert.errors import BundleError, OutputError
from fastvlm_convert.json_file import MAX_JSON_BYTES, parse_json
from fastvlm_convert.manifest import BESIDE, FILE_NAME, FileEntry, Manifest, contradictions, manifest_of
from fastvlm_convert.progress import OnStage, ignore_stage
from fastvlm_convert.regular_file import decoded, open_file

MAX_RATIO: Final = (
    200  # of an entry's size to its compressed size; text deflates to a tenth, zeros to a 1000th
)
MAX_BESIDE_BYTES: Final = MAX_JSON_BYTES  # of what is said about the bundle, which no manifest lists
_MAX_ENTRIES: Final = 10_000
_ENCRYPTED: Final = 0x1
_CHUNK: Final = 1 << 20
_HINT: Final = "get the file again from where it comes"


def unpack(
    file: Path,
    output: Path,
    overwrite: bool = False,
    say: Say = lambda note: None,
    on_progress: OnStage = ignore_stage,
) -> Manifest:
    """Make a bundle's folder of a zip file.

    Args:
        file: The zip file.
        output: Folder to make.
        overwrite: Whether an existing bundle may be replaced.
        say: Called with what the user should know.
        on_progress: Called with what is being done and the share of it that is done, 0..1.

    Returns:
        The manifest.

    Raises:
        BundleError: The file is no zip of a bundle, or not an honest one.
        OutputError: The folder cannot be made.
    """
    try:
        with BufferedReader(open_file(file)) as raw, ZipFile(raw) as archive:
            entries = _entries(archive, file, raw.seek(0, 2))
            manifest = _manifest(archive, entries, file)
            wanted = _wanted(manifest, entries, file)
            _see_room(output, sum(wanted[name].size for name in wanted))
            with new_folder(output, overwrite, [file], say) as folder:
                _write(archive, entries, wanted, folder, file, on_progress)
    except FileNotFoundError as error:
        raise BundleError("there is no such file", where=file, hint=_HINT) from error
    except (BadZipFile, NotImplementedError, zlib.error, EOFError) as error:
        raise BundleError(f"no zip file that can be read: {error}", where=file, hint=_HINT) from error
    except OSError as error:
        raise BundleError(f"cannot read: {error.strerror}", where=file, hint=_HINT) from error
    return manifest


def _entries(archive: ZipFile, file: Path, file_size: int) -> dict[str, ZipInfo]:
    """The files in a zip by their names, which are safe to write.

    Raises:
        BundleError: They are not, or the zip claims what cannot be.
    """
    infos = archive.infolist()
    if len(infos) > _MAX_ENTRIES:
        raise BundleError(
            f"it has {len(infos)} entries, no bundle has more than {_MAX_ENTRIES}", where=file, hint=_HINT
        )
    for info in infos:
        if (problem := _entry_problem(info)) is not None:
            raise BundleError(problem, where=file, hint=_HINT)
    if sum(info.compress_size for info in infos) > file_size:
        raise BundleError(
            "its entries overlap: together they are larger than the file", where=file, hint=_HINT
        )
    for problem in clashes(info.filename for info in infos if not info.is_dir()):
        raise BundleError(problem, where=file, hint=_HINT)
    return {info.filename: info for info in infos if not info.is_dir()}


def _entry_problem(info: ZipInfo) -> str | None:
    """Why an entry may not be written; sizes that the manifest states are compared later."""
    name = info.orig_filename  # as it is in the file: Python cuts names at a zero byte
    is_folder = info.is_dir()
    if (problem := name_problem(name.removesuffix("/") if is_folder else name)) is not None:
        return problem
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFDIR if is_folder else stat.S_IFREG):
        return f"{quoted(name)} is {'a link' if kind == stat.S_IFLNK else 'no plain file'}"
    if info.flag_bits & _ENCRYPTED:
        return f"{quoted(name)} is encrypted"
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        return f"{quoted(name)} is compressed in a way that bundles are not"
    if info.compress_type == ZIP_STORED and info.file_size != info.compress_size:
        return f"{quoted(name)} is stored, but in another size than its own"
    if info.file_size > MAX_RATIO * max(info.compress_size, 1):
        return f"{quoted(name)} would grow more than {MAX_RATIO}-fold"
    return f"{quoted(name)} is a folder with content" if is_folder and info.file_size else None


def _manifest(archive: ZipFile, entries: dict[str, ZipInfo], file: Path) -> Manifest:
    info = entries.get(FILE_NAME)
    if info is None:
        hint = "give a file that `fastvlm-convert bundle pack --for zip` made"
        raise BundleError(f"no bundle: it has no {FILE_NAME} at its top", where=file, hint=hint)
    content = _content(archive, info, MAX_JSON_BYTES, file)
    try:
        value = parse_json(decoded(content))
    except ValueError as error:
        raise BundleError(f"its {FILE_NAME} is not valid JSON: {error}", where=file, hint=_HINT) from error
    manifest = manifest_of(value, file / FILE_NAME)
    for problem in contradictions(manifest):
        raise BundleError(problem, where=file, hint=_HINT)
    return manifest


def _content(archive: ZipFile, info: ZipInfo, max_bytes: int, file: Path) -> bytes:
    if info.file_size > max_bytes:
        what = f"{quoted(info.filename)} has {info.file_size} bytes, at most {max_bytes} make sense"
        raise BundleError(what, where=file, hint=_HINT)
    with archive.open(info) as source:
        return source.read(max_bytes + 1)[:max_bytes]


def _wanted(manifest: Manifest, entries: dict[str, ZipInfo], file: Path) -> dict[str, FileEntry]:
    """Size and hash of every file to write; of what no manifest lists the hash is not known, and empty.

    Raises:
        BundleError: The zip has other files than the manifest, or in other sizes.
    """
    beside: dict[str, FileEntry] = {
        name: FileEntry(entries[name].file_size, "") for name in (FILE_NAME, *BESIDE) if name in entries
    }
    wanted = {**manifest.files, **beside}
    problems = [f"{quoted(name)} is missing" for name in manifest.files if name not in entries]
    problems += [f"{quoted(name)} is not the bundle's" for name in entries if name not in wanted]
    problems += [
        f"{quoted(name)} has {entries[name].file_size} bytes, the manifest says {entry.size}"
        for name, entry in wanted.items()
        if name in entries and entries[name].file_size != entry.size
    ]
    problems += [
        f"{quoted(name)} has {entry.size} bytes, at most {MAX_BESIDE_BYTES} make sense"
        for name, entry in beside.items()
        if entry.size > MAX_BESIDE_BYTES
    ]
    for problem in problems:
        raise BundleError(problem, where=file, hint=_HINT)
    return wanted


def _see_room(output: Path, needed: int) -> None:
    """Before anything is written: what the manifest asks for may be far more than the zip's size."""
    parent = next((path for path in output.absolute().parents if path.is_dir()), Path("/"))
    free = shutil.disk_usage(parent).free
    if needed > free:
        what = f"the bundle needs {needed} bytes, {free} are free"
        raise OutputError(what, where=output, hint="make room, or choose another folder")


def _write(
    archive: ZipFile,
    entries: dict[str, ZipInfo],
    wanted: dict[str, FileEntry],
    folder: Path,
    file: Path,
    on_progress: OnStage,
) -> None:
    total = sum(entry.size for entry in wanted.values()) or 1
    done = 0
    on_progress("files", 0.0)
    for name in _sorted(wanted):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        left = wanted[name].size
        with archive.open(entries[name]) as source, path.open("xb") as sink:
            while piece := source.read(min(_CHUNK, left + 1)):
                left -= len(piece)
                if left < 0:
                    raise BadZipFile(f"{quoted(name)} is longer than it says")
                digest.update(piece)
                sink.write(piece)
        if left or wanted[name].sha256 not in ("", digest.hexdigest()):
            what = f"{quoted(name)} has other content than the manifest says"
            raise BundleError(what, where=file, hint=_HINT)
        done += wanted[name].size
        on_progress("files", done / total)


def _sorted(names: Iterable[str]) -> list[str]:
    """The manifest last: until then it is no bundle."""
    return sorted(names, key=lambda name: (name == FILE_NAME, name))
