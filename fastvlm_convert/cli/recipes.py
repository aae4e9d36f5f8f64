"""`fastvlm-convert recipes`: what ships with the tool, and how to write one."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer
from rich.markup import escape
from rich.table import Table

from fastvlm_convert.cli.console import err, out, print_json, size_text
from fastvlm_convert.cli.options import JsonOption, VerboseOption
from fastvlm_convert.errors import RecipeError, TargetError
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

_SIZE: Final = "0.5b"  # the model whose sizes are shown


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this recipe's file.", show_default=False)
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print a JSON schema of recipe files, for editors.")
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """List the shipped recipes, or print one to start from."""
    if schema:
        if name is not None:
            raise RecipeError("--schema is the same for every recipe", hint="leave the name away")
        typer.echo(json.dumps(recipe_schema(), indent=2))
        return
    if name is not None:
        _print_file(name, as_json)
        return
    facts = [describe(load_recipe(known)) for known in shipped_recipes()]
    if as_json:
        print_json("recipes", "passed", recipes=facts)
    else:
        _print(facts)


def _print_file(name: str, as_json: bool) -> None:
    shipped = shipped_recipes()
    if name not in shipped:
        raise RecipeError(f"unknown recipe '{name}'", hint=f"shipped recipes: {', '.join(shipped)}")
    text = shipped[name].read_text(encoding="utf-8")
    if as_json:
        print_json("recipes", "passed", recipe=load_recipe(name).to_dict(), text=text)
    else:
        typer.echo(text, nl=False)


def describe(recipe: Recipe) -> dict[str, Any]:
    """What a recipe makes of FastVLM-0.5B, as plain data."""
    config = published_config(_SIZE)
    folded = placeholder_weights(config, ())
    plans = plan_layers({name: weight.shape for name, weight in folded.items()}, recipe)
    stored: dict[str, list[str]] = {}
    for group in group_layers(plans):
        names = stored.setdefault(group.component, [])
        text = scheme_name(group.scheme) or f"float{group.stored_bits // group.num_weights}"
        if text not in names:
            names.append(text)
    return {
        "name": recipe.name,
        "description": recipe.description,
        "stored_as": stored,
        "targets": {target: _target_facts(target, config, plans, recipe) for target in BACKENDS},
    }


def _target_facts(
    target: Target, config: ModelConfig, plans: Sequence[LayerPlan], recipe: Recipe
) -> dict[str, Any]:
    """Bytes of the artifacts, or why the target cannot take the recipe."""
    try:
        backend_of(target).check(config, recipe, plans)
    except TargetError as error:
        return {"bytes": None, "refused": str(error)}
    sizes = predict_artifacts(config, plans, recipe, [target]).sizes
    return {"bytes": sum(sizes.values()), "refused": None}


def _print(facts: list[dict[str, Any]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("recipe", "vision", "decoder", "table"):
        table.add_column(column)
    for target in BACKENDS:
        table.add_column(target, justify="right")
    table.add_column("description")
    for recipe in facts:
        stored = recipe["stored_as"]
        sizes = [recipe["targets"][target]["bytes"] for target in BACKENDS]
        table.add_row(
            recipe["name"],
            *(", ".join(stored[part]) for part in ("vision", "decoder", "embedding")),
            *("no" if size is None else size_text(size) for size in sizes),
            escape(recipe["description"]),
        )
    out.print(table)
    err.print("\nSizes are FastVLM-0.5B's, without tokenizer; no: the target cannot take it.", soft_wrap=True)
    err.print("Start from one: fastvlm-convert recipes NAME > mine.yaml", soft_wrap=True)
