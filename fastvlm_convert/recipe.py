"""Recipes: how to convert, and the strict loader of their YAML files."""

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final

from fastvlm_convert.dataclass_io import about, from_plain, setting
from fastvlm_convert.errors import RecipeError, did_you_mean
from fastvlm_convert.gates import Gates
from fastvlm_convert.io_names import PATCH_SIZE
from fastvlm_convert.recipe_settings import (
    MAX_IMAGE_SIZE,
    MIN_IMAGE_SIZE,
    CalibrationSettings,
    CommonSettings,
    CoreMLSettings,
    DecoderSettings,
    FloatSettings,
    FromCheckpoint,
    OnnxSettings,
    QuantizeRule,
    RepairSettings,
    TableSettings,
)
from fastvlm_convert.yaml_file import read_yaml_file

MAX_RECIPE_BYTES: Final = 64 << 10  # the longest shipped one has 5 kB
SERVER_SETTINGS: Final = "serve.yaml"  # stands beside the recipes, and is none


@dataclass(frozen=True)
class Recipe:
    """How to convert a checkpoint."""

    name: str = field(metadata=about("What it makes; also the file name."))
    description: str = field(metadata=about("One line that says what it is for."))
    vision: FloatSettings = field(metadata=about("Encoder and projector."))
    decoder: DecoderSettings = field(metadata=about("Decoder layers and head."))
    embed: TableSettings = field(metadata=about("Embedding table."))
    gates: Gates = field(metadata=about("What the result must pass."))
    common: CommonSettings = setting(CommonSettings(), "What every target shares.")
    onnx: OnnxSettings = setting(OnnxSettings(), "ONNX only.")
    coreml: CoreMLSettings = setting(CoreMLSettings(), "Core ML only.")
    quantize: tuple[QuantizeRule, ...] = setting((), "Which layers are quantized, and how; none if empty.")
    calibration: CalibrationSettings = setting(CalibrationSettings(), "How solvers that need data use it.")
    repairs: RepairSettings = setting(RepairSettings(), "What keeps the decoder within the range of float16.")
    notes: tuple[str, ...] = setting((), "What users should know before shipping; `export` prints these.")

    @property
    def is_calibrated(self) -> bool:
        """Whether any rule needs data."""
        return any(rule.solver != "search" for rule in self.quantize)

    def __post_init__(self) -> None:
        if self.common.max_context_length % self.coreml.prefill_chunk:
            raise RecipeError(
                f"common.max_context_length {self.common.max_context_length} is no multiple of "
                f"coreml.prefill_chunk {self.coreml.prefill_chunk}"
            )
        if self.onnx.shared_table and self.embed.storage != self.decoder.storage:
            raise RecipeError(
                "onnx.shared_table needs one storage for head and embedding, got "
                f"{self.decoder.storage} (decoder) and {self.embed.storage} (embed)",
                hint="set onnx.shared_table to false, or the same storage for both",
            )

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain data, for YAML and JSON."""
        return dataclasses.asdict(self)


def without_data(recipe: Recipe) -> Recipe:
    """The same recipe with every solver replaced by the search that needs no data."""
    return dataclasses.replace(
        recipe, quantize=tuple(dataclasses.replace(rule, solver="search") for rule in recipe.quantize)
    )


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the tool, by name."""
    packaged = Path(str(resources.files("fastvlm_convert"))) / "configs"
    checkout = Path(__file__).parent.parent / "configs"
    folder = packaged if packaged.is_dir() else checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml")) if path.name != SERVER_SETTINGS}


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Load a shipped recipe by name, or any recipe by the path of its YAML file.

    Raises:
        RecipeError: There is no such recipe, it is no YAML, or a setting is unknown, missing or impossible.
    """
    shipped = shipped_recipes()
    path = shipped.get(str(name_or_path), Path(name_or_path))
    if path.suffix not in (".yaml", ".yml"):
        raise RecipeError(
            f"unknown recipe '{name_or_path}'",
            hint=f"{did_you_mean(str(name_or_path), shipped)}shipped recipes: {', '.join(shipped)}; "
            "or give the path of a .yaml file",
        )
    try:
        recipe = from_plain(Recipe, read_yaml_file(path, MAX_RECIPE_BYTES))
        _check_image_size(recipe.common.image_size)
    except FileNotFoundError as error:
        hint = f"the tool ships one: --recipe {path.stem}" if path.stem in shipped else None
        raise RecipeError("there is no such recipe", where=path, hint=hint) from error
    except OSError as error:
        raise RecipeError(f"cannot read: {error.strerror}", where=path) from error
    except RecipeError as error:
        raise RecipeError(error.args[0], where=path, hint=error.given_hint) from error
    except ValueError as error:
        raise RecipeError(str(error), where=path) from error
    return recipe


def _check_image_size(size: int | FromCheckpoint) -> None:
    """A checkpoint may have been trained at any size; those that can be chosen are fewer."""
    if size != "checkpoint" and not MIN_IMAGE_SIZE <= size <= MAX_IMAGE_SIZE:
        raise RecipeError(
            f"common.image_size is {size}, expected a multiple of {PATCH_SIZE} "
            f"from {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}, or 'checkpoint'"
        )
