"""The user's cache, and files that appear whole or not at all."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Where this tool keeps what it measured: the user's cache, or `FASTVLM_CONVERT_CACHE`."""
    if "FASTVLM_CONVERT_CACHE" in os.environ:
        return Path(os.environ["FASTVLM_CONVERT_CACHE"])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastvlm-convert"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvlm-convert"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends without an error.

    Raises:
        OSError: The file cannot be put there.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
