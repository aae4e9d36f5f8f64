"""Names of files that mean the same on every system that a bundle is copied or unpacked to."""

import unicodedata
from collections.abc import Iterable, Iterator

from fastvlm_convert.errors import printable, shortened

_MAX_SHOWN = 100
_MAX_NAME = 255  # bytes of one part of a path; file systems take no more
_DRIVES = ":"  # of Windows, and the separator of old Macs


def name_problem(name: str) -> str | None:
    """Why a file of a bundle may not have this name, or None if it may.

    A name is a path relative to the bundle, with slashes.
    """
    parts = name.split("/")
    if name.startswith("/") or _DRIVES in name or "\\" in name or ".." in parts:
        return f"{quoted(name)} does not lie inside a bundle on every system"
    if "" in parts or "." in parts:
        return f"{quoted(name)} is no plain path"
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
        return f"{quoted(name)} has characters that cannot be printed"
    if any(len(part.encode()) > _MAX_NAME for part in parts):
        return f"{quoted(name)} is too long"
    return None


def clashes(names: Iterable[str]) -> Iterator[str]:
    """Which names cannot stand side by side on every system: twice, in two cases, a file and a folder."""
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name in names:
        key = _same(name)
        if key in seen:
            other = seen[key]
            what = (
                "stands there twice" if other == name else f"and {quoted(other)} are one file on some systems"
            )
            yield f"{quoted(name)} {what}"
        seen[key] = name
        parts = key.split("/")
        folders |= {"/".join(parts[:n]): name for n in range(1, len(parts))}
    for key, name in seen.items():
        if key in folders:
            yield f"{quoted(name)} is a file, and a folder for {quoted(folders[key])}"


def _same(name: str) -> str:
    """Equal for names that are one on systems that ignore case or compose accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def quoted(name: str) -> str:
    """A name for a message."""
    return f"'{shortened(printable(name), _MAX_SHOWN)}'"
