"""Recipes: how to convert. Frozen, typed settings and their strict YAML loader."""

import dataclasses
import types
import typing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import yaml

from fastvlm_convert.contract import PATCH_SIZE, FloatName
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.preprocess import ImageMode

FromCheckpoint = Literal["checkpoint"]

MIN_IMAGE_SIZE: Final = 256
MAX_IMAGE_SIZE: Final = 1536
MIN_CONTEXT_LENGTH: Final = 64
MAX_CONTEXT_LENGTH: Final = 131072


@dataclass(frozen=True)
class CommonSettings:
    """What every target shares.

    Attributes:
        image_size: Edge of the square input in pixels, or `checkpoint` for the size it was trained at.
        image_mode: How images are made square: `pad`, `crop`, or `checkpoint` for what its config says.
        max_context_length: Tokens the KV cache can hold, image tokens included.
    """

    image_size: int | FromCheckpoint = "checkpoint"
    image_mode: ImageMode | FromCheckpoint = "checkpoint"
    max_context_length: int = 2048

    def __post_init__(self) -> None:
        size = self.image_size
        if size != "checkpoint" and (size % PATCH_SIZE or not MIN_IMAGE_SIZE <= size <= MAX_IMAGE_SIZE):
            raise RecipeError(
                f"common.image_size is {size}, expected a multiple of {PATCH_SIZE} "
                f"from {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}, or 'checkpoint'"
            )
        if not MIN_CONTEXT_LENGTH <= self.max_context_length <= MAX_CONTEXT_LENGTH:
            raise RecipeError(
                f"common.max_context_length is {self.max_context_length}, "
                f"expected {MIN_CONTEXT_LENGTH} to {MAX_CONTEXT_LENGTH}"
            )


@dataclass(frozen=True)
class FloatSettings:
    """Precision of a component whose weights are stored as floats.

    Attributes:
        storage: Dtype of the weights in the file.
        compute: Dtype of its arithmetic; the decoder's KV cache has it too.
    """

    storage: FloatName
    compute: FloatName

    def __post_init__(self) -> None:
        if self.compute == "float16" and self.storage == "float32":
            raise RecipeError("compute: float16 needs storage: float16; the file would hold unused bits")


@dataclass(frozen=True)
class TableSettings:
    """Precision of the embedding table; looking a row up is no arithmetic.

    Attributes:
        storage: Dtype of the rows in the file.
    """

    storage: FloatName


@dataclass(frozen=True)
class OnnxSettings:
    """What only the ONNX target has.

    Attributes:
        shared_table: Store a tied head and embedding once, in the decoder's data file. Native runtimes and
            Node open that; a browser cannot, because it finds data files by the graph's own name.
    """

    shared_table: bool = True


@dataclass(frozen=True)
class Gates:
    """What `verify` demands.

    Attributes:
        min_sqnr_db: Least signal to noise of every numeric stage against the reference.
        identical_text: Whether the greedy answers must be the reference's, token by token.
        max_new_tokens: Length of the answers that are compared.
    """

    min_sqnr_db: float
    identical_text: bool
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.max_new_tokens <= 1024:
            raise RecipeError(f"gates.max_new_tokens is {self.max_new_tokens}, expected 1 to 1024")


@dataclass(frozen=True)
class Recipe:
    """How to convert a checkpoint.

    Attributes:
        name: What it makes; also its file name.
        description: One line for people.
        vision: Encoder and projector.
        decoder: Decoder layers and head.
        embed: Embedding table.
        gates: What the result must pass.
        common: What every target shares.
        onnx: ONNX only.
    """

    name: str
    description: str
    vision: FloatSettings
    decoder: FloatSettings
    embed: TableSettings
    gates: Gates
    common: CommonSettings = CommonSettings()
    onnx: OnnxSettings = OnnxSettings()

    def __post_init__(self) -> None:
        if self.onnx.shared_table and self.embed.storage != self.decoder.storage:
            raise RecipeError(
                "onnx.shared_table needs one storage for head and embedding, got "
                f"{self.decoder.storage} (decoder) and {self.embed.storage} (embed)",
                hint="set onnx.shared_table to false, or the same storage for both",
            )

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain data."""
        return dataclasses.asdict(self)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the tool, by name."""
    packaged = Path(str(resources.files("fastvlm_convert"))) / "configs"
    checkout = Path(__file__).parent.parent / "configs"
    folder = packaged if packaged.is_dir() else checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str) -> Recipe:
    """Load a shipped recipe by name, or any recipe by the path of its YAML file.

    Raises:
        RecipeError: There is no such recipe, it is no YAML, or a setting is unknown, missing or impossible.
    """
    shipped = shipped_recipes()
    path = shipped.get(name_or_path, Path(name_or_path))
    if path.suffix not in (".yaml", ".yml"):
        raise RecipeError(
            f"unknown recipe '{name_or_path}'",
            hint=f"shipped recipes: {', '.join(shipped)}; or give the path of a .yaml file",
        )
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError("there is no such recipe", where=path) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read: {error}", where=path) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"not valid YAML: {' '.join(str(error).split())}", where=path) from error
    try:
        return recipe_from_dict(value)
    except RecipeError as error:
        raise RecipeError(error.args[0], where=path, hint=error.hint) from error


def recipe_from_dict(value: object) -> Recipe:
    """Build a recipe from plain data, as YAML or a manifest holds it.

    Raises:
        RecipeError: A setting is unknown, missing, of the wrong type or impossible.
    """
    return _build(Recipe, value, "")


_T = TypeVar("_T")


def _build(kind: type[_T], value: object, prefix: str) -> _T:
    place = prefix.rstrip(".") or "the recipe"
    if not isinstance(value, dict):
        raise RecipeError(f"{place} is {value!r}, expected settings")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = [str(key) for key in value if key not in fields]
    if unknown:
        raise RecipeError(
            f"unknown setting {', '.join(prefix + key for key in unknown)}",
            hint=f"allowed in {place}: {', '.join(fields)}",
        )
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
    missing = [prefix + name for name in required if name not in value]
    if missing:
        raise RecipeError(
            f"missing setting {', '.join(missing)}", hint=f"{place} needs: {', '.join(required)}"
        )
    hints = typing.get_type_hints(kind)
    built = {name: _value(hints[name], given, f"{prefix}{name}") for name, given in value.items()}
    return kind(**built)


def _value(hint: Any, given: object, place: str) -> Any:  # noqa: ANN401
    if dataclasses.is_dataclass(hint):
        return _build(hint, given, f"{place}.")  # type: ignore[arg-type]
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if is_union else (hint,)
    literals = [v for k in kinds if typing.get_origin(k) is Literal for v in typing.get_args(k)]
    plain = [k for k in kinds if typing.get_origin(k) is not Literal]
    if given in literals and isinstance(given, str):
        return given
    if type(given) in plain:
        return given
    if type(given) is int and float in plain:
        return float(given)
    allowed = [repr(v) for v in literals] + [f"a {k.__name__}" for k in plain]
    raise RecipeError(f"{place} is {given!r}, expected {' or '.join(allowed)}")
