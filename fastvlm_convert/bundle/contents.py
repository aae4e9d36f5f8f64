"""Which files of a folder are this tool's, so that `--overwrite` deletes no others."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NoReturn

from fastvlm_convert.bundle.license import NOTICE
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import ConversionError, OutputError
from fastvlm_convert.json_file import read_json_file
from fastvlm_convert.manifest import BESIDE, FILE_NAME, OLD_FILE_NAME, PROGRESS_FILE

_NOBODYS: Final = (".DS_Store", PROGRESS_FILE)  # the first appears wherever a Mac's Finder has been


def strays_in_bundle(folder: Path) -> list[str]:
    """Files below a bundle's folder that are neither listed in its manifest nor said about the bundle."""
    listed: set[str] = set(BESIDE)
    for name in (FILE_NAME, OLD_FILE_NAME):
        try:
            value = read_json_file(folder / name)
        except (OSError, ValueError):
            continue
        files = value.get("files") if isinstance(value, dict) else None
        listed |= {name, *(files if isinstance(files, dict) else ())}
    return unlisted(folder, listed)


def strays_in_quantized(folder: Path) -> list[str]:
    """Files below a quantized checkpoint's folder that opening it as one does not read.

    Raises:
        OutputError: It is damaged, so nobody knows what belongs to it.
    """
    try:
        files = open_checkpoint(folder).files
    except ConversionError as error:
        raise OutputError(
            f"the quantized checkpoint is damaged, so its files cannot be told from yours: {error.args[0]}",
            where=folder,
            hint="delete it yourself, or choose another folder",
        ) from error
    return unlisted(folder, {NOTICE, *(path.name for path in files)})


def unlisted(folder: Path, known: Iterable[str]) -> list[str]:
    """Everything below a folder that is no folder and not known, relative to it.

    Raises:
        OSError: A folder cannot be looked into.
    """
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found += [(Path(parent) / name).relative_to(folder) for name in (*files, *links)]
    names = (path.as_posix() for path in found if path.name not in _NOBODYS)
    return sorted(set(names) - set(known))


def _raise(error: OSError) -> NoReturn:
    raise error
