"""layers.json: how a bundle stores every matrix and convolution, so that two bundles can be compared."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.dataclass_io import from_plain
from fastvlm_convert.errors import BundleError, RecipeError, shown
from fastvlm_convert.json_file import read_json_file
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.layer_report import scheme_text
from fastvlm_convert.weights.parts import part_of

LAYERS_FILE: Final = "layers.json"
SCHEMA: Final = "fastvlm-convert/layers"
SCHEMA_VERSION: Final = 1


@dataclass(frozen=True)
class StoredLayer:
    """One layer's weight as a bundle stores it.

    Attributes:
        layer: Name without `.weight`.
        shape: Dimensions.
        scheme: How it is stored, in words: `int4 block 32`, `float16`.
        solver: What found its integers; None in float.
        reason: Why it stays in float, or has smaller blocks or groups than its rule said; else None.
        stored_bits: Bits of it in a file, scales and zero points included.
    """

    layer: str
    shape: tuple[int, ...]
    scheme: str
    solver: str | None
    reason: str | None
    stored_bits: int

    def __post_init__(self) -> None:
        try:
            part_of(self.layer)
        except ValueError as error:
            raise BundleError(str(error)) from error


@dataclass(frozen=True)
class _Layers:
    layers: tuple[StoredLayer, ...]


def layers_json(plans: Sequence[LayerPlan]) -> bytes:
    """The content of layers.json: one layer a line."""
    lines = [json.dumps(_plain(plan), ensure_ascii=False) for plan in plans]
    head = f'{{\n"schema": {json.dumps(SCHEMA)},\n"schema_version": {SCHEMA_VERSION},\n"layers": [\n'
    return (head + ",\n".join(lines) + "\n]\n}\n").encode()


def _plain(plan: LayerPlan) -> dict[str, object]:
    is_float = plan.scheme is None
    return {
        "layer": plan.layer,
        "shape": list(plan.shape),
        "scheme": f"float{plan.stored_bits // plan.size}" if is_float else scheme_text(plan.scheme),
        "solver": None if is_float else plan.solver,
        "reason": plan.reason,
        "stored_bits": plan.stored_bits,
    }


def read_layers(bundle: Path) -> tuple[StoredLayer, ...] | None:
    """The layers of a bundle, or None where it was made by a version that did not say.

    Raises:
        BundleError: The file is damaged.
    """
    path = bundle / LAYERS_FILE
    try:
        value = read_json_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BundleError(f"cannot read: {error.strerror}", where=path) from error
    except ValueError as error:
        raise BundleError(f"not valid JSON: {error}", where=path) from error
    if not isinstance(value, dict) or value.pop("schema", None) != SCHEMA:
        raise BundleError("no list of layers of fastvlm-convert", where=path)
    version = value.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise BundleError(f"version {shown(version)}; this tool reads {SCHEMA_VERSION}", where=path)
    try:
        return from_plain(_Layers, value).layers
    except (BundleError, RecipeError) as error:
        raise BundleError(f"malformed: {error.args[0]}", where=path) from error
