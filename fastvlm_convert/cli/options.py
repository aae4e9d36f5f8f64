"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

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
