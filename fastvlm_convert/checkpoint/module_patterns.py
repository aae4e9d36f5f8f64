"""PEFT's patterns of module names, matched in bounded time.

A key of `alpha_pattern` is a regular expression out of a file that anybody may have written, and Python's
engine goes back over its steps: `(a+)+b` takes it years. Here all places that a match may have reached are
followed together, so time grows with the pattern and the name, and with nothing else. Python's own parser
reads the pattern.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from re import _constants as codes  # type: ignore[attr-defined]  # typeshed does not know it
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_PATTERN = 1000  # characters
MAX_NAME = 500
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    codes.CATEGORY_DIGIT: str.isdecimal,
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
    codes.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    codes.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    codes.CATEGORY_NOT_WORD: lambda char: not (char.isalnum() or char == "_"),
}

Places = frozenset[int]


def matching_key(keys: Iterable[str], module: str) -> str | None:
    """The first key that fits a module, as PEFT's `get_pattern_key` finds it.

    Args:
        keys: Regular expressions for a module's whole name, or for its end after a dot.
        module: Name of the module.

    Raises:
        ValueError: A key is malformed, too long, or holds what cannot be matched in bounded time.
    """
    for key in keys:
        if key == module:
            return key
        try:
            if _ends(_parsed(key), module[:MAX_NAME], frozenset([0])):
                return key
        except (RecursionError, OverflowError) as error:
            raise ValueError(f"{key[:60]!r}: it is nested too deeply") from error
        except re.error as error:
            raise ValueError(f"{key[:60]!r}: {error.msg}") from error
    return None


@lru_cache(maxsize=256)
def _parsed(key: str) -> list[Any]:
    if len(key) > MAX_PATTERN:
        raise re.error(f"it is longer than {MAX_PATTERN} characters")
    return list(parser.parse(rf"(.*\.)?({key})$"))


def _ends(nodes: Iterable[Any], text: str, places: Places) -> Places:
    """Where matches of a sequence end that begin at one of `places`."""
    for code, value in nodes:
        places = _step(code, value, text, places)
        if not places:
            break
    return places


def _step(code: Any, value: Any, text: str, places: Places) -> Places:  # noqa: ANN401  the parser's types
    if code in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN):
        return frozenset(i + 1 for i in places if i < len(text) and _fits(code, value, text[i]))
    if code is codes.BRANCH:
        return frozenset().union(*(_ends(branch, text, places) for branch in value[1]))
    if code is codes.SUBPATTERN and not value[1] and not value[2]:
        return _ends(value[3], text, places)
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        least, most, nodes = value
        return _repeated((least, most), nodes, text, places)
    if code is codes.AT and value in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
        return places & {0}
    if code is codes.AT and value in (codes.AT_END, codes.AT_END_STRING):
        return places & {len(text)}
    raise re.error(f"{str(code).lower().replace('_', ' ')} is not supported in it")


def _repeated(times: tuple[int, int], nodes: Iterable[Any], text: str, places: Places) -> Places:
    least, most = times
    for _ in range(least):
        reached = _ends(nodes, text, places)
        if (
            reached == places
        ):  # and so would be all rounds that follow; at the latest when there are no places
            break
        places = reached
    found = new = places
    for _ in range(most - least):
        new = _ends(nodes, text, new) - found
        if not new:
            break
        found |= new
    return found


def _fits(code: Any, value: Any, char: str) -> bool:  # noqa: ANN401
    if code is codes.ANY:
        return char != "\n"
    if code is codes.LITERAL:
        return ord(char) == value
    if code is codes.NOT_LITERAL:
        return ord(char) != value
    negated = value[0][0] is codes.NEGATE
    return negated != any(_in_set(kind, item, char) for kind, item in value[negated:])


def _in_set(kind: Any, item: Any, char: str) -> bool:  # noqa: ANN401
    if kind is codes.LITERAL:
        return ord(char) == item
    if kind is codes.RANGE:
        return item[0] <= ord(char) <= item[1]
    return _CATEGORIES[item](char)
