"""JSON as strictly as we write it: nothing twice, no number that no program can hold."""

import json
from pathlib import Path
from typing import Any, Final

from fastvlm_convert.errors import shown
from fastvlm_convert.regular_file import read_text

MAX_JSON_BYTES: Final = 4 << 20  # settings take far less; each byte of one may cost twenty of memory
_MAX_DIGITS: Final = 400  # a float64 has at most 309 before its point


def read_json_file(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:  # noqa: ANN401
    """The value in a JSON file.

    Raises:
        OSError: The file cannot be read; see `regular_file`.
        ValueError: It is no JSON; says why.
    """
    return parse_json(read_text(path, max_bytes))


def parse_json(text: str | bytes) -> Any:  # noqa: ANN401
    """The value of a JSON text.

    Raises:
        ValueError: It is no JSON, or a key stands twice in an object.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return values


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(text)} digits")
    return int(text)
