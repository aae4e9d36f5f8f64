"""Where this tool stores between runs what it measured or solved."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """The folder in the user's cache, or `FASTVLM_CONVERT_CACHE`."""
    if "FASTVLM_CONVERT_CACHE" in os.environ:
        return Path(os.environ["FASTVLM_CONVERT_CACHE"])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastvlm-convert"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvlm-convert"
