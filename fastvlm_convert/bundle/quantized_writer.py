"""Write a quantized checkpoint, one weight after the other."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, cast

from fastvlm_convert.arithmetic import num_elements
from fastvlm_convert.bundle.folder import QUANTIZED_CHECKPOINT
from fastvlm_convert.bundle.license import license_files
from fastvlm_convert.bundle.resumable import Work
from fastvlm_convert.checkpoint.quantized_checkpoint import FILE_NAME, Quantization
from fastvlm_convert.io_names import FloatName
from fastvlm_convert.manifest import Source
from fastvlm_convert.progress import OnShare
from fastvlm_convert.quantization.weight_plan import WeightPlan
from fastvlm_convert.quantized.codec import matrix_entries, matrix_tensors
from fastvlm_convert.quantized.layer_plan import float_storage
from fastvlm_convert.quantized.layer_report import layer_reports
from fastvlm_convert.quantized.sqnr import ErrorMeter, SquaredSums
from fastvlm_convert.quantized.weight import AnyWeight, MixedSource
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.parts import HEAD, part_of
from fastvlm_convert.weights.safetensors_file import Entries, Layout, lay_out
from fastvlm_convert.weights.source import Weight
from fastvlm_convert.weights.storage import to_storage

MAX_SHARD_BYTES: Final = 5_000_000_000  # what model hosts ask for


def write_weights(
    work: Work, weights: MixedSource, recipe: Recipe, meter: ErrorMeter, on_progress: OnShare
) -> None:
    """Write all weights but those that an earlier run finished.

    Args:
        work: The folder under construction.
        weights: Canonical names, folded; integers where planned, seen through `meter`.
        recipe: Decides the dtypes of floats.
        meter: Knows the errors of each weight once it was read.
        on_progress: Called with the share of the weights written, 0..1.

    Raises:
        CheckpointError: A weight cannot be read.
        RecipeError: A weight is too large for the dtype the recipe stores it in.
        OSError: The disk is full.
    """
    layouts = _shards(work.folder, weights, recipe)
    if not work.finished:
        files = list({layout.path: layout for layout in layouts.values()}.values())
        for layout in files:
            layout.create()
        if len(files) > 1:
            _write_index(work.folder, files)
    total = sum(_num_weights(weight) for weight in weights.values())
    done = 0
    for name, weight in weights.items():
        if name not in work.finished:
            _write(layouts[name], name, weight)
            work.finish(name, None if isinstance(weight, Weight) else asdict(meter.sums(name)))
        done += _num_weights(weight)
        on_progress(done / total)


def write_settings(work: Work, plan: WeightPlan, source: Source, tool: str) -> Quantization:
    """Write everything else: the checkpoint's settings, its license, quantized.json last.

    Args:
        work: The folder under construction, all weights finished.
        plan: What was done to the float checkpoint.
        source: What quantized.json says about the checkpoint.
        tool: Version of fastvlm-convert.

    Raises:
        OSError: A file cannot be copied.
    """
    checkpoint = plan.checkpoint
    for path in checkpoint.settings:
        if path != checkpoint.license:
            shutil.copyfile(path, work.folder / path.name)
    if checkpoint.license is not None:
        made = license_files(checkpoint.license, plan.recipe, QUANTIZED_CHECKPOINT.name)
        for name, content in made.items():
            (work.folder / name).write_bytes(content)
    layers = layer_reports(plan.layers, lambda name: SquaredSums(**work.finished[name]))
    record = Quantization(tool, source, plan.recipe, layers)
    (work.folder / FILE_NAME).write_text(record.to_json(), encoding="utf-8")
    return record


def _num_weights(weight: AnyWeight) -> int:
    return num_elements(weight.shape)


def _dtype(name: str, weights: MixedSource, recipe: Recipe) -> FloatName:
    """The dtype the recipe stores; a table that head and embedding share serves both."""
    dtype = float_storage(name, recipe)
    is_shared = part_of(name) == "embedding" and f"{HEAD}.weight" not in weights
    return recipe.decoder.storage if is_shared and dtype == "float16" else dtype


def _entries(name: str, weights: MixedSource, recipe: Recipe) -> Entries:
    weight = weights[name]
    if isinstance(weight, Weight):
        return {name: (_dtype(name, weights, recipe), weight.shape)}
    parts = matrix_entries(weight.scheme, weight.rows, weight.columns)
    return {f"{name}.{part}": entry for part, entry in parts.items()}


def _shards(folder: Path, weights: MixedSource, recipe: Recipe) -> dict[str, Layout]:
    """The file of every weight: one for all, or as many as keep below `MAX_SHARD_BYTES`."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in weights:
        entries = _entries(name, weights, recipe)
        needed = lay_out(folder, entries).size
        if groups[-1] and size + needed > MAX_SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += needed
    layouts: dict[str, Layout] = {}
    for number, names in enumerate(groups, 1):
        alone = len(groups) == 1
        file = "model.safetensors" if alone else f"model-{number:05}-of-{len(groups):05}.safetensors"
        merged: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in names:
            merged |= _entries(name, weights, recipe)
        layouts |= dict.fromkeys(names, lay_out(folder / file, merged))
    return layouts


def _write_index(folder: Path, files: Sequence[Layout]) -> None:
    tensors = {name: tensor for layout in files for name, tensor in layout.tensors.items()}
    index = {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors.values())},
        "weight_map": {name: tensors[name].path.name for name in sorted(tensors)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(layout: Layout, name: str, weight: AnyWeight) -> None:
    if isinstance(weight, Weight):
        dtype = cast(FloatName, layout.tensors[name].dtype)
        layout.write(name, (to_storage(chunk, dtype, name) for chunk in weight.chunks()))
        return
    written: Counter[str] = Counter()  # rows, of which a table has fewer than the indices
    for matrix in weight.chunks():
        for part, array in matrix_tensors(matrix).items():
            layout.write(f"{name}.{part}", [array], first_row=written[part])
            written[part] += len(array)
