"""`fastvlm-convert recipes`: what ships with the tool, and how to write one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import typer
from rich.markup import escape

from fastvlm_convert.amounts import size_text
from fastvlm_convert.cli.console import err, out, plain_table, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.options import complete_recipe
from fastvlm_convert.errors import RecipeError, TargetError, UsageError, did_you_mean
from fastvlm_convert.exporters.backends import backend_of
from fastvlm_convert.predict.placeholder_weights import placeholder_weights
from fastvlm_convert.predict.sizes import predict_artifacts
from fastvlm_convert.quantized.layer_groups import group_layers, scheme_name
from fastvlm_convert.quantized.layer_plan import LayerPlan, plan_layers
from fastvlm_convert.recipe import Recipe, load_recipe, shipped_recipes
from fastvlm_convert.recipe_schema import recipe_schema
from fastvlm_convert.targets import BACKENDS, Target
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.published import published_config

EXAMPLES = """
fastvlm-convert recipes
fastvlm-convert recipes int4 > mine.yaml
"""
_SIZE: Final = "0.5b"  # the model whose sizes are shown


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
    facts = [describe(load_recipe(known)) for known in shipped_recipes()]
    report(context, "passed", RecipesDocument(tuple(facts)), lambda: _print(facts, flags_of(context).quiet))


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


def describe(recipe: Recipe) -> RecipeFacts:
    """What a recipe makes of FastVLM-0.5B."""
    config = published_config(_SIZE)
    folded = placeholder_weights(config, ())
    plans = plan_layers({name: weight.shape for name, weight in folded.items()}, recipe)
    stored: dict[str, list[str]] = {}
    for group in group_layers(plans):
        names = stored.setdefault(group.component, [])
        text = scheme_name(group.scheme) or f"float{group.stored_bits // group.num_weights}"
        if text not in names:
            names.append(text)
    return RecipeFacts(
        name=recipe.name,
        description=recipe.description,
        stored_as={component: tuple(names) for component, names in stored.items()},
        targets={target: _target_facts(target, config, plans, recipe) for target in BACKENDS},
    )


def _target_facts(
    target: Target, config: ModelConfig, plans: Sequence[LayerPlan], recipe: Recipe
) -> TargetFacts:
    """Bytes of the artifacts, or why the target cannot take the recipe."""
    try:
        backend_of(target).check(config, recipe, plans)
    except TargetError as error:
        return TargetFacts(None, str(error))
    sizes = predict_artifacts(config, plans, recipe, [target]).sizes
    return TargetFacts(sum(sizes.values()), None)


def _print(facts: list[RecipeFacts], quiet: bool) -> None:
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
