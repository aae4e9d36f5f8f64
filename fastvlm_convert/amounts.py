"""Amounts as people read them, wherever they stand."""

import re


def size_text(count: float) -> str:
    """A number of bytes: decimal units, as phones and stores count."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.{1 if count < 100 * factor else 0}f} {unit}"
    return f"{count:.0f} B"


def parse_size(text: str) -> int | None:
    """A number of bytes as people write it: `4GB`, `1.5 GiB`, `800M`, `123`; None for anything else."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*(?:([kmgt])?(i)?b?)", text.strip().lower())
    if match is None or (match[3] and not match[2]):
        return None
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** (" kmgt".index(match[2]) if match[2] else 0))


def count_text(count: int, noun: str) -> str:
    """`1 check`, `16 checks`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
