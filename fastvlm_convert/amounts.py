"""Amounts as people read them, wherever they stand."""


def size_text(count: float) -> str:
    """A number of bytes: decimal units, as phones and stores count."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.{1 if count < 100 * factor else 0}f} {unit}"
    return f"{count:.0f} B"


def count_text(count: int, noun: str) -> str:
    """`1 check`, `16 checks`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
