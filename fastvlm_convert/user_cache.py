"""Where this tool keeps what it measured or solved between runs."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Where this tool keeps what it measured: the user's cache, or `FASTVLM_CONVERT_CACHE`."""
    if "FASTVLM_CONVERT_CACHE" in os.environ:
        return Path(os.environ["FASTVLM_CONVERT_CACHE"])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastvlm-convert"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvlm-convert"
