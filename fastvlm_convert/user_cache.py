"""Where this tool stores between runs what it measured or solved."""

import os
import sys
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Where this tool keeps what it measured: the user's cache, or `FASTVLM_CONVERT_CACHE`."""
    if own := os.environ.get("FASTVLM_CONVERT_CACHE"):
        return Path(own)
    try:
        home = Path.home()
    except RuntimeError:  # a container's user may have none
        home = Path(tempfile.gettempdir()) / f"fastvlm-convert-{os.getuid()}"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "fastvlm-convert"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "fastvlm-convert"
