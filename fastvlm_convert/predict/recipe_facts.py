"""What each shipped recipe makes of FastVLM-0.5B, read from a file: predicting it takes seconds.

`make docs` (`python -m tests.shipped_recipe_facts`) writes the file, from `recipe_sizes`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.dataclass_io import from_plain
from fastvlm_convert.targets import Target

SHIPPED_FACTS: Final = Path(__file__).with_name("shipped_recipe_facts.json")


@dataclass(frozen=True)
class TargetFacts:
    """What a target makes of a recipe.

    Attributes:
        bytes: Size of its artifacts; None where it cannot take the recipe.
        refused: Why not, else None.
    """

    bytes: int | None
    refused: str | None


@dataclass(frozen=True)
class RecipeFacts:
    """What a recipe makes of FastVLM-0.5B.

    Attributes:
        name: Its name.
        description: What it is for.
        stored_as: By component, the ways in which its layers are stored.
        targets: By target.
    """

    name: str
    description: str
    stored_as: dict[str, tuple[str, ...]]
    targets: dict[Target, TargetFacts]


@dataclass(frozen=True)
class _Facts:
    recipes: tuple[RecipeFacts, ...]


def shipped_recipe_facts() -> tuple[RecipeFacts, ...]:
    """Of every shipped recipe, in the order that they are listed in."""
    return from_plain(_Facts, {"recipes": json.loads(SHIPPED_FACTS.read_text(encoding="utf-8"))}).recipes
