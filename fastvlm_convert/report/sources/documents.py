"""JSON documents of other commands: the fields that the page needs are checked, others passed over."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from fastvlm_convert.errors import BundleError, shown
from fastvlm_convert.json_file import read_json_file

_MAX_BYTES: Final = 64 << 20  # samples of every round, answers to every question


class Fields:
    """An object of a document.

    Args:
        values: Its fields.
        path: The file, for messages.
        place: Where in it the object stands, for messages.
        hint: What to do where a field is not what it should be.
    """

    def __init__(self, values: Mapping[str, object], path: Path, place: str, hint: str) -> None:
        self._values, self._path, self._place, self._hint = values, path, place, hint

    def text(self, key: str) -> str:
        """A text."""
        value = self._values.get(key)
        return value if isinstance(value, str) else self._refuse(key, "a text")

    def optional_text(self, key: str) -> str | None:
        """A text, or None where there is none."""
        return None if self._values.get(key) is None else self.text(key)

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._values.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        return self._refuse(key, "a number")

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None where there is none."""
        return None if self._values.get(key) is None else self.number(key)

    def count(self, key: str) -> int:
        """A whole number."""
        value = self.number(key)
        return int(value) if value == int(value) else self._refuse(key, "a whole number")

    def object(self, key: str) -> "Fields":
        """An object."""
        value = self._values.get(key)
        if not isinstance(value, dict):
            return self._refuse(key, "an object")
        return Fields(value, self._path, f"{self._place}{key}.", self._hint)

    def optional_object(self, key: str) -> "Fields | None":
        """An object, or None where there is none."""
        return None if self._values.get(key) is None else self.object(key)

    def objects(self, key: str) -> "list[Fields]":
        """A list of objects."""
        values = self._values.get(key)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            return self._refuse(key, "a list of objects")
        places = (f"{self._place}{key}[{n}]." for n in range(len(values)))
        return [
            Fields(value, self._path, place, self._hint) for value, place in zip(values, places, strict=True)
        ]

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self._values.get(key)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            return self._refuse(key, "a list of texts")
        return tuple(values)

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def _refuse(self, key: str, expected: str):  # type: ignore[no-untyped-def]  # noqa: ANN202  never returns
        what = f"malformed: {self._place}{key} is {shown(self._values.get(key))}, expected {expected}"
        raise BundleError(what, where=self._path, hint=self._hint)


def _is_of(value: Mapping[str, object], command: str) -> bool:
    """Whether a document, or a file such as a baseline of `bench`, is a command's."""
    return command == value.get("command") or f"fastvlm-convert/{command}" == value.get("schema")


def read_document(path: Path, command: str, versions: tuple[int, ...]) -> Fields:
    """The JSON document that a command printed.

    Args:
        path: The file it was written to.
        command: Name of the command.
        versions: Of its schema, that can be read.

    Raises:
        BundleError: It cannot be read, or another command or version wrote it.
    """
    hint = f"write it with: fastvlm-convert {command} ... --json > {command}.json"
    try:
        value = read_json_file(path, _MAX_BYTES)
    except FileNotFoundError as error:
        raise BundleError("there is no such file", where=path, hint=hint) from error
    except OSError as error:
        raise BundleError(f"cannot read: {error.strerror}", where=path, hint=hint) from error
    except ValueError as error:
        raise BundleError(f"not valid JSON: {error}", where=path, hint=hint) from error
    if not isinstance(value, dict) or not _is_of(value, command):
        raise BundleError(f"not a document of `fastvlm-convert {command}`", where=path, hint=hint)
    if value.get("schema_version") not in versions:
        known = " and ".join(map(str, versions))
        what = f"version {shown(value.get('schema_version'))}; this tool reads {known}"
        raise BundleError(what, where=path, hint=hint)
    return Fields(value, path, "", hint)
