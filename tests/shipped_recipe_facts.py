"""Write what the shipped recipes make of FastVLM-0.5B into the package; run by `make docs`."""

import dataclasses
import json

from fastvlm_convert.predict.recipe_facts import SHIPPED_FACTS
from fastvlm_convert.predict.recipe_sizes import describe
from fastvlm_convert.recipe import load_recipe, shipped_recipes


def facts_of_shipped_recipes() -> str:
    """The content of the file, as the code has it."""
    facts = [dataclasses.asdict(describe(load_recipe(name))) for name in shipped_recipes()]
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SHIPPED_FACTS.write_text(facts_of_shipped_recipes(), encoding="utf-8")
