"""Whether Core ML is here; asking loads nothing."""

import platform


def has_core_ml() -> bool:
    """Whether this machine can run Core ML packages."""
    return platform.system() == "Darwin"
