"""Settings in checkpoint files."""

from pathlib import Path
from typing import Any

from fastvlm_convert.errors import CheckpointError, ConversionError
from fastvlm_convert.json_file import MAX_JSON_BYTES, read_json_file
from fastvlm_convert.regular_file import is_there
from fastvlm_convert.regular_file import read_text as read_text_file
from fastvlm_convert.weights.file_tensors import AGAIN

_NAMES = {list: "list", str: "text", bool: "truth value", type(None): "null"}


def read_json(
    path: Path, kind: type[ConversionError] = CheckpointError, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint.

    Args:
        path: The file.
        kind: The error to raise.
        max_bytes: The largest size that makes sense.

    Raises:
        ConversionError: The file is missing, unreadable, not JSON, or not an object.
    """
    try:
        value = read_json_file(path, max_bytes)
    except FileNotFoundError as error:
        hint = f"give the folder that holds {path.name}"
        raise kind(f"'{path.name}' is missing", where=path.parent, hint=hint) from error
    except OSError as error:
        raise kind(f"cannot read: {error.strerror}", where=path, hint=AGAIN) from error
    except ValueError as error:
        raise kind(f"not valid JSON: {error}", where=path, hint=AGAIN) from error
    if not isinstance(value, dict):
        found = _NAMES.get(type(value), "number")
        raise kind(f"expected a JSON object, found {found}", where=path, hint=AGAIN)
    return value


def read_text(path: Path, kind: type[ConversionError] = CheckpointError) -> str:
    """Read a text file of a checkpoint.

    Raises:
        ConversionError: The file cannot be read or is no text.
    """
    try:
        return read_text_file(path)
    except OSError as error:
        raise kind(f"cannot read: {error.strerror}", where=path, hint=AGAIN) from error
    except ValueError as error:
        raise kind(f"cannot read: {error}", where=path, hint="save it as UTF-8") from error


def optional_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file, or an empty one without the file.

    Raises:
        CheckpointError: The file is damaged.
    """
    return read_json(path) if is_there(path) else {}
