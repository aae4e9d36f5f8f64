"""A bundle as one zip file: the same bytes for the same bundle, wherever and whenever it is made.

Files are stored, not deflated: weights hardly shrink, and what a deflater writes depends on its version.
"""

import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Final
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from fastvlm_convert.progress import OnShare
from fastvlm_convert.regular_file import open_file

_EARLIEST: Final = (1980, 1, 1, 0, 0, 0)  # the first time that the format can express
_UNIX: Final = 3
_MODE: Final = stat.S_IFREG | 0o644
_CHUNK: Final = 1 << 20


def write_zip(files: Mapping[str, Path], output: Path, on_progress: OnShare) -> None:
    """Write files into a new zip file, in the order of their names.

    Args:
        files: Names in the zip -> files.
        output: File to make.
        on_progress: Called with the share of the bytes that are written, 0..1.

    Raises:
        OSError: A file cannot be read, or the zip not be written.
    """
    total = sum(path.stat().st_size for path in files.values()) or 1
    done = 0
    with ZipFile(output, "w", ZIP_STORED, allowZip64=True) as archive:
        for name in sorted(files):
            entry = ZipInfo(name, _EARLIEST)
            entry.create_system = _UNIX
            entry.external_attr = _MODE << 16
            entry.file_size = files[name].stat().st_size  # decides whether the entry needs zip64
            with open_file(files[name]) as source, archive.open(entry, "w") as sink:
                _copy(source, sink)
            done += entry.file_size
            on_progress(done / total)


def _copy(source: IO[bytes], sink: IO[bytes]) -> None:
    shutil.copyfileobj(source, sink, _CHUNK)
