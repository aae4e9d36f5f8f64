"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a FastVLM checkpoint.", show_default=False)
]
NO_DATA = "none"

AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter", metavar="FOLDER", help="LoRA adapter (PEFT folder) to merge in.", show_default=False
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


def data_source(calibration: str | None) -> Path | None:
    """Where `--calibration` says the pictures are; None generates some, or none are needed."""
    return None if calibration in (None, NO_DATA) else Path(str(calibration))
