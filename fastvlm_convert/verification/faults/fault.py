"""What a fault is: data, and a plain function that plants it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.verification.faults.bundle_copy import Copy

Wrap = Callable[[LoadedModel], LoadedModel]
Plant = Callable[[Copy], Wrap | None]

BUNDLE = "bundle"  # where a fault is in no artifact, but in what clients read beside them
EVERY_TARGET = "*"


class NotApplicableError(Exception):
    """A bundle has no place for a fault; the text says why. Never reaches the user as an error."""


@dataclass(frozen=True)
class Fault:
    """A known fault.

    Attributes:
        id: Its name, for people and for scripts.
        what: What is wrong, in a line.
        plants: How it is planted, by where: `bundle`, a target, or `*` for every target that is not named.
            A function edits the copy it is given; where the fault is one of the app around the files, it
            returns what makes a loaded model behave so. It raises `NotApplicableError` where the bundle has
            no place for it.
        absent: Why targets that `plants` does not name cannot have it; empty where it is in files that all
            targets share, and planted there.
    """

    id: str
    what: str
    plants: Mapping[str, Plant]
    absent: str = ""
