"""Settings in checkpoint files."""

import json
from pathlib import Path
from typing import Any

from fastvlm_convert.errors import CheckpointError, ConversionError


def read_json(path: Path, kind: type[ConversionError] = CheckpointError) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint.

    Args:
        path: The file.
        kind: The error to raise.

    Raises:
        ConversionError: The file is missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise kind(f"'{path.name}' is missing", where=path.parent) from error
    except OSError as error:
        raise kind(f"cannot read: {error.strerror}", where=path) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of 5000 digits
        raise kind(f"not valid JSON: {error}", where=path) from error
    if not isinstance(value, dict):
        raise kind(f"expected a JSON object, found {type(value).__name__}", where=path)
    return value


def optional_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file, or an empty one without the file.

    Raises:
        CheckpointError: The file is damaged.
    """
    return read_json(path) if path.is_file() else {}
