"""Quantized checkpoints: quantized.json says what was made of a float checkpoint, safetensors files hold it.

docs/formats.md describes the format.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fastvlm_convert.checkpoint.dimensions import check_shapes, infer_config
from fastvlm_convert.checkpoint.files import read_json
from fastvlm_convert.checkpoint.layouts import Layout
from fastvlm_convert.checkpoint.picture_settings import MAX_IMAGE_SIZE
from fastvlm_convert.dataclass_io import from_plain, has_schema
from fastvlm_convert.errors import CheckpointError, ConversionError, RecipeError, shown
from fastvlm_convert.manifest import Source
from fastvlm_convert.quantized.codec import matrix_entries, stored_weight
from fastvlm_convert.quantized.layer_plan import LayerPlan, check_groups
from fastvlm_convert.quantized.layer_report import LayerReport
from fastvlm_convert.quantized.weight import AnyWeight, MixedSource, dense_view
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.resolved_recipe import ResolvedRecipe
from fastvlm_convert.weights.file_tensors import FileTensor
from fastvlm_convert.weights.fold import folded_shapes
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.rescale import repaired_config
from fastvlm_convert.weights.shapes import weight_shapes
from fastvlm_convert.weights.source import Weight, reshaped

FILE_NAME: Final = "quantized.json"
SCHEMA: Final = "fastvlm-convert/quantized"
SCHEMA_VERSION: Final = 2
_AGAIN: Final = "copy the quantized checkpoint again, or quantize again"


@dataclass(frozen=True)
class Quantization:
    """What quantized.json says.

    Attributes:
        tool: Version of fastvlm-convert.
        source: The float checkpoint.
        recipe: The recipe, with every setting resolved.
        layers: What was done to every matrix and convolution.
    """

    tool: str
    source: Source
    recipe: ResolvedRecipe
    layers: tuple[LayerReport, ...]

    @property
    def plans(self) -> tuple[LayerPlan, ...]:
        """The plan that was followed."""
        return tuple(report.plan for report in self.layers)

    def to_json(self) -> str:
        """The content of quantized.json."""
        value = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        return json.dumps(value, indent=2, allow_nan=False) + "\n"


@dataclass(frozen=True)
class QuantizedContent:
    """What a quantized checkpoint holds.

    Attributes:
        record: Its quantized.json.
        weights: Canonical names, folded; integers where the record says so.
    """

    record: Quantization
    weights: MixedSource


def is_quantized(folder: Path) -> bool:
    """Whether a folder holds a quantized.json of this tool, of whatever version, however damaged."""
    return has_schema(folder / FILE_NAME, SCHEMA)


def read_record(folder: Path) -> Quantization:
    """Read and validate a quantized.json.

    Raises:
        CheckpointError: It is missing, of another version or malformed.
    """
    path = folder / FILE_NAME
    value = read_json(path)
    if value.pop("schema", None) != SCHEMA:
        raise CheckpointError(f"not a {FILE_NAME} of fastvlm-convert", where=path, hint=_AGAIN)
    version = value.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{FILE_NAME} is of version {shown(version)}; this tool reads {SCHEMA_VERSION}",
            where=path,
            hint="quantize again, or use the version of the tool that wrote it",
        )
    try:
        record = from_plain(Quantization, value)
        check_groups(record.plans)
        _check_consistent(record)
    except ConversionError as error:
        raise CheckpointError(
            f"malformed: {error.args[0]}", where=path, hint=error.given_hint or _AGAIN
        ) from error
    return record


def _check_consistent(record: Quantization) -> None:
    size = record.recipe.common.image_size
    if size > MAX_IMAGE_SIZE:
        raise CheckpointError(f"recipe.common.image_size is {size}, expected pixels up to {MAX_IMAGE_SIZE}")
    if len({report.layer for report in record.layers}) < len(record.layers):
        raise CheckpointError("it lists a layer twice")
    try:
        json.dumps(dataclasses.asdict(record), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair; no file that we write can
        raise CheckpointError("it holds text that is no Unicode") from error


def quantized_content(
    record: Quantization, tensors: Mapping[str, FileTensor], raw: Mapping[str, Any], layout: Layout,
    image_size: int, path: Path,
) -> tuple[ModelConfig, QuantizedContent, tuple[str, ...]]:  # fmt: skip
    """The weights of a quantized checkpoint, and the dimensions they give; only headers were read.

    Args:
        record: Its quantized.json.
        tensors: The tensors of its files.
        raw: The parsed config.json.
        layout: Whose layout that is.
        image_size: Edge of the square input in pixels.
        path: The checkpoint, for messages.

    Returns:
        The dimensions, the weights, and the names of tensors that no part of the model reads.

    Raises:
        CheckpointError: Tensors, record and config do not fit together.
    """
    found: dict[str, AnyWeight] = {}
    parts: set[str] = set()
    for report in record.layers:
        scheme, name = report.quantized, f"{report.layer}.weight"
        if scheme is not None:
            found[name] = stored_weight(tensors, name, report.shape, scheme, path)
            entries = matrix_entries(scheme, report.shape[0], report.plan.columns)
            parts |= {f"{name}.{part}" for part in entries}
    for name, tensor in tensors.items():
        if name not in parts:
            if name in found:
                what = f"tensor '{name}' is stored both in float and quantized"
                raise CheckpointError(what, where=path, hint=_AGAIN)
            found[name] = tensor.weight()
    floats = {
        name: weight if isinstance(found[name], Weight) else replace(weight, dtype="float32")
        for name, weight in dense_view(found).items()
    }
    config = infer_config(floats, raw, layout, image_size, path)
    expected = folded_shapes(weight_shapes(config))
    check_shapes(floats, expected, path)
    layers = {f"{report.layer}.weight": report.shape for report in record.layers}
    for name in {*layers, *(name for name in expected if name.endswith(".weight"))}:
        shape = expected.get(name, ())
        if layers.get(name) != (shape if len(shape) > 1 else None):
            raise CheckpointError(
                f"{FILE_NAME} and the tensors disagree about '{name}'", where=path, hint="quantize again"
            )
    weights: dict[str, AnyWeight] = {}
    for name, shape in expected.items():
        weight = found[name]
        weights[name] = reshaped(weight, shape) if isinstance(weight, Weight) else weight
    unused = tuple(sorted(name for name in tensors if name not in parts and name not in expected))
    try:
        repaired = repaired_config(config, record.recipe.repairs)
    except RecipeError as error:
        raise CheckpointError(f"malformed: {error.args[0]}", where=path / FILE_NAME, hint=_AGAIN) from error
    return repaired, QuantizedContent(record, weights), unused


def check_recipe(record: Quantization, recipe: Recipe, path: Path) -> None:
    """See that a recipe asks for the very integers that are stored; other sections may differ.

    Raises:
        RecipeError: It asks for others, or for activations that nothing is recorded about.
    """
    if recipe.vision.activations != "float":
        raise RecipeError(
            f"vision.activations is {recipe.vision.activations}, and a quantized checkpoint holds weights "
            "alone",
            where=path,
            hint="export the float checkpoint, or set vision.activations to float",
        )
    for section in ("quantize", "calibration", "repairs"):
        if getattr(recipe, section) != getattr(record.recipe, section):
            raise RecipeError(
                f"the checkpoint was quantized with recipe '{record.recipe.name}', whose {section} section "
                f"differs from that of recipe '{recipe.name}'",
                where=path,
                hint="leave --recipe out, or quantize the float checkpoint with the other recipe",
            )
