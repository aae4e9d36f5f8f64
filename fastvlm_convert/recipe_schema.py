"""The JSON schema of recipe files."""

from typing import Any

from fastvlm_convert.dataclass_io import schema_of
from fastvlm_convert.recipe import Recipe


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of recipe files, with which editors complete and check them.

    It knows every key, type, choice and range; rules between settings only the loader knows.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of fastvlm-convert",
        **schema_of(Recipe),
    }
