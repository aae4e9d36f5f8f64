"""Arguments and options that several commands share."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from fastvlm_convert.amounts import parse_size
from fastvlm_convert.recipe import Recipe, load_recipe, shipped_recipes, without_data
from fastvlm_convert.targets import BACKENDS, Target, known_target
from fastvlm_convert.user_cache import without_cache

NO_DATA = "none"
TARGET_NAMES = "|".join(BACKENDS)


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes, for the shell; a path completes by itself."""
    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def complete_target(incomplete: str) -> list[str]:
    """Names of targets, for the shell."""
    return [target for target in BACKENDS if target.startswith(incomplete)]


def _size(text: str) -> int:
    """The bytes that `4GB` is."""
    size = parse_size(text)
    if not size:
        raise typer.BadParameter(f"'{text}' is no size: write 4GB, 1.5GiB or a number of bytes")
    return size


CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Folder of a FastVLM checkpoint, or its id on Hugging Face: apple/FastVLM-0.5B[@REVISION].",
        show_default=False,
    ),
]
BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.", show_default=False)
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="LoRA adapter (of PEFT, LLaVA or MLX) to merge in.",
        show_default=False,
    ),
]
ProjectorOption = Annotated[
    Path | None,
    typer.Option(
        "--projector",
        metavar="FILE",
        help="Projector in a file of its own: LLaVA's mm_projector.bin.",
        show_default=False,
    ),
]
VisionTowerOption = Annotated[
    Path | None,
    typer.Option(
        "--vision-tower",
        metavar="FILE",
        help="Encoder in a file of its own, in Apple's or timm's names.",
        show_default=False,
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar=f"FOLDER|JSONL|{NO_DATA}",
        help="Images and questions to calibrate with; the default mix if omitted. "
        f"'{NO_DATA}' skips calibration and takes seconds.",
        show_default=False,
    ),
]
ImagesOption = Annotated[
    Path | None,
    typer.Option(
        "--images",
        metavar="FOLDER",
        help="Images to ask about, with an optional questions.json; generated ones if omitted.",
        show_default=False,
    ),
]
TargetOption = Annotated[
    list[str],
    typer.Option(
        "--target",
        metavar=TARGET_NAMES,
        help="Format to export; repeat it for several.",
        autocompletion=complete_target,
        show_default=False,
    ),
]
MaxMemoryOption = Annotated[
    int | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        parser=_size,
        help="Refuse to begin what needs more memory, 4GB for example; what is free if omitted.",
        show_default=False,
    ),
]
NoCacheOption = Annotated[
    bool,
    typer.Option("--no-cache", help="Neither read nor write what is kept between runs (see `cache show`)."),
]
RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="A shipped recipe or a YAML file.",
        autocompletion=complete_recipe,
        show_default=False,
    ),
]
StoredRecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="A shipped recipe or a YAML file; a quantized checkpoint brings its own.",
        autocompletion=complete_recipe,
        show_default=False,
    ),
]


def cache_used(is_used: bool) -> AbstractContextManager[None]:
    """Within it, the user's cache is used or not, as `--no-cache` says."""
    return nullcontext() if is_used else without_cache()


def chosen_targets(names: list[str]) -> list[Target]:
    """The targets of `--target`, each once.

    Raises:
        TargetError: There is no such target.
    """
    return [known_target(name) for name in dict.fromkeys(names)]


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
    """The folder or file that `--calibration` names, or None."""
    return None if calibration in (None, NO_DATA) else Path(str(calibration))
