"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from fastvlm_convert.errors import TargetError
from fastvlm_convert.manifest import Target
from fastvlm_convert.pipeline import TARGETS

CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a FastVLM checkpoint.", show_default=False)
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter", metavar="FOLDER", help="LoRA adapter (PEFT folder) to merge in.", show_default=False
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
