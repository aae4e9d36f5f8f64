"""The languages that constants are written in."""

from collections.abc import Callable
from typing import Final

from fastvlm_convert.bundle.constants import java, javascript, kotlin, swift
from fastvlm_convert.bundle.constants.contract import ClientContract
from fastvlm_convert.errors import UsageError, did_you_mean

LANGUAGES: Final[dict[str, Callable[[ClientContract], str]]] = {
    "kotlin": kotlin.render,
    "java": java.render,
    "swift": swift.render,
    "javascript": javascript.render,
}


def known_language(name: str) -> str:
    """The language of a name.

    Raises:
        UsageError: There is none.
    """
    if name not in LANGUAGES:
        raise UsageError(
            f"unknown language '{name}'",
            hint=f"{did_you_mean(name, LANGUAGES)}languages: {', '.join(LANGUAGES)}",
        )
    return name


def render_constants(contract: ClientContract, language: str) -> str:
    """Source code with everything that an app must know of a bundle; ends with a line break.

    Args:
        contract: What it must know.
        language: One of `LANGUAGES`.
    """
    return LANGUAGES[language](contract)
