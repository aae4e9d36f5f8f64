"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from fastvlm_convert.errors import TargetError
from fastvlm_convert.manifest import Target
from fastvlm_convert.pipeline import TARGETS
from fastvlm_convert.recipe import Recipe, load_recipe, without_data

CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a FastVLM checkpoint.", show_default=False)
]
NO_DATA = "none"

AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="LoRA adapter (of PEFT, LLaVA or MLX) to merge in.",
        show_default=False,
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FOLDER|JSONL|none",
        help="Pictures for solvers that need data; generated ones by default. none: search without data.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.")]
TargetOption = Annotated[
    list[str], typer.Option("--target", help="Format to export; may be repeated.", show_default=False)
]
RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe", metavar="NAME|FILE", help="A shipped recipe or a YAML file.", show_default=False
    ),
]
StoredRecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="A shipped recipe or a YAML file; a quantized checkpoint has its own.",
        show_default=False,
    ),
]


def chosen_targets(names: list[str]) -> list[Target]:
    """The targets of `--target`, each once.

    Raises:
        TargetError: There is no such target.
    """
    chosen: list[Target] = []
    for name in dict.fromkeys(names):
        known = [target for target in TARGETS if target == name]
        if not known:
            raise TargetError(f"unknown target '{name}'", hint=f"targets: {', '.join(TARGETS)}")
        chosen += known
    return chosen


def chosen_recipe(name: str, calibration: str | None = None) -> Recipe:
    """The recipe of `--recipe`.

    Args:
        name: Name or path.
        calibration: What `--calibration` says; `none` replaces the solvers that need data.

    Raises:
        RecipeError: It is unknown or malformed.
    """
    recipe = load_recipe(name)
    return without_data(recipe) if calibration == NO_DATA else recipe


def data_source(calibration: str | None) -> Path | None:
    """Where `--calibration` says the pictures are; None generates some, or none are needed."""
    return None if calibration in (None, NO_DATA) else Path(str(calibration))
