"""`fastvlm-convert recipes`: what ships with the tool, and how to write one."""

import json
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.markup import escape

from fastvlm_convert.amounts import size_text
from fastvlm_convert.cli.console import err, out, plain_table, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.options import complete_recipe
from fastvlm_convert.errors import RecipeError, UsageError, did_you_mean
from fastvlm_convert.predict.recipe_facts import RecipeFacts, shipped_recipe_facts
from fastvlm_convert.recipe import Recipe, load_recipe, shipped_recipes
from fastvlm_convert.recipe_schema import recipe_schema
from fastvlm_convert.targets import BACKENDS

EXAMPLES = """
fastvlm-convert recipes
fastvlm-convert recipes int4 > mine.yaml
"""


@dataclass(frozen=True)
class RecipesDocument(Document, name="recipes"):
    """The shipped recipes."""

    recipes: tuple[RecipeFacts, ...]


@dataclass(frozen=True)
class RecipeDocument(Document, name="recipe"):
    """One of them.

    Attributes:
        recipe: Its settings.
        text: Its file.
    """

    recipe: Recipe
    text: str


def command(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="Print the file of this recipe.",
            autocompletion=complete_recipe,
            show_default=False,
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipe files, for editors.")
    ] = False,
) -> None:
    """List the shipped recipes, or print one to start from.

    Sizes are those of FastVLM-0.5B.
    """
    if schema:
        if name is not None:
            raise UsageError("--schema is the same for every recipe", hint="omit the recipe name")
        typer.echo(json.dumps(recipe_schema(), indent=2))
        return
    if name is not None:
        _print_file(context, name)
        return
    facts = shipped_recipe_facts()
    report(context, "passed", RecipesDocument(facts), lambda: _print(facts, flags_of(context).quiet))


def _print_file(context: typer.Context, name: str) -> None:
    shipped = shipped_recipes()
    if name not in shipped:
        raise RecipeError(
            f"unknown recipe '{name}'",
            hint=f"{did_you_mean(name, shipped)}shipped recipes: {', '.join(shipped)}",
        )
    text = shipped[name].read_text(encoding="utf-8")
    document = RecipeDocument(load_recipe(name), text)
    report(context, "passed", document, lambda: typer.echo(text, nl=False))


def _print(facts: tuple[RecipeFacts, ...], quiet: bool) -> None:
    described = plain_table("recipe", "what it is for", wrap=("what it is for",))
    sized = plain_table("recipe", "vision", "decoder", "embedding", *BACKENDS, right=tuple(BACKENDS))
    for recipe in facts:
        described.add_row(recipe.name, escape(recipe.description))
        stored = recipe.stored_as
        sizes = [recipe.targets[target].bytes for target in BACKENDS]
        sized.add_row(
            recipe.name,
            *(", ".join(stored[part]) for part in ("vision", "decoder", "embedding")),
            *("-" if size is None else size_text(size) for size in sizes),
        )
    out.print(described)
    out.print()
    out.print(sized)
    if not quiet:
        err.print(
            "\nSizes are FastVLM-0.5B's, without tokenizer; -: the target does not support it.",
            soft_wrap=True,
        )
        err.print("Start your own: fastvlm-convert recipes NAME > mine.yaml", soft_wrap=True)
