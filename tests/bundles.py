"""Bundles of the golden checkpoints, and the means to look into them and to change them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from fastvlm_convert.io_names import Component
from fastvlm_convert.manifest import FILE_NAME, Manifest, load_manifest
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import Recipe, load_recipe
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle

FP32, FP16 = "fp32", "fp16"


def recipe(name: str = FP32, **sections: dict[str, Any]) -> Recipe:
    """A shipped recipe with some settings changed: `recipe("fp32", common={"image_size": 320})`."""
    base = load_recipe(name)
    changed = {section: replace(getattr(base, section), **values) for section, values in sections.items()}
    return replace(base, **changed)


def export_bundle(checkpoint: Path, output: Path, settings: Recipe | None = None) -> Path:
    """Export the ONNX target; the fp32 recipe by default."""
    export(checkpoint, output, recipe=settings or recipe(), targets=["onnx"])
    return output


def open_bundle(bundle: Path) -> LoadedModel:
    """A bundle ready to run."""
    return load_bundle(bundle, "onnx")


def copy_bundle(bundle: Path, folder: Path) -> Path:
    """A writable copy of a bundle."""
    return Path(shutil.copytree(bundle, folder / "bundle"))


def graph_path(bundle: Path, component: Component, function: str | None = None) -> Path:
    """Where a component's graph lies; the first where it has several and none is named."""
    return bundle / load_manifest(bundle).artifact("onnx", component, function).files[0]


def load_graph(bundle: Path, component: Component, function: str | None = None) -> onnx.ModelProto:
    """A component's graph, its weights left in their file."""
    return onnx.load(graph_path(bundle, component, function), load_external_data=False)


def external_regions(model: onnx.ModelProto) -> dict[str, tuple[str, int, int]]:
    """Location, offset and length of every initializer that lies in a data file."""
    regions = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            regions[tensor.name] = (facts["location"], int(facts["offset"]), int(facts["length"]))
    return regions


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` alter the parsed manifest of a bundle."""
    path = bundle / FILE_NAME
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def manifest_of(bundle: Path) -> Manifest:
    """A bundle's manifest."""
    return load_manifest(bundle)


def check_sizes(predicted: dict[str, int], bundle: Path) -> None:
    """See that a bundle's files have the sizes that were predicted of them, and that none was forgotten.

    Args:
        predicted: Bytes by file.
        bundle: The bundle.
    """
    written = {name: entry.size for name, entry in load_manifest(bundle).files.items()}
    assert set(predicted) >= {name for name in written if "/" in name}
    for name, size in predicted.items():
        assert size == written[name], name


# Integers of both widths, with and without zero points, and layers that stay in float for either reason.
MIXED_RULES = (
    QuantizeRule(("decoder.embed_tokens", "decoder.lm_head"), "int8", 16),
    QuantizeRule(("*.down_proj",), "float"),
    QuantizeRule(("decoder.*",), "int4", 16, symmetric=False),
    QuantizeRule(("*.fc1", "*.fc2"), "int4", 64, on_indivisible="float"),
    QuantizeRule(("*",), "int8"),
)


def mixed_recipe() -> Recipe:
    """A recipe that quantizes the golden checkpoints in every way."""
    return replace(recipe("int4"), name="mixed", quantize=MIXED_RULES)


def write_recipe(settings: Recipe, path: Path) -> Path:
    """A recipe as the YAML file that a user would give."""
    path.write_text(json.dumps(settings.to_dict()))  # JSON is YAML
    return path
