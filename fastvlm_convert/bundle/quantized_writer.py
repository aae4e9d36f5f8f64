"""Write a quantized checkpoint, one weight after the other."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, cast

from fastvlm_convert.arithmetic import num_elements
from fastvlm_convert.atomic_file import to_disk
from fastvlm_convert.bundle.folder import QUANTIZED_CHECKPOINT
from fastvlm_convert.bundle.license import license_files
from fastvlm_convert.bundle.resumable import Work
from fastvlm_convert.checkpoint.quantized_checkpoint import FILE_NAME, Quantization
from fastvlm_convert.errors import CheckpointError
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
from fastvlm_convert.regular_file import MAX_TEXT_BYTES, open_file, read_file
from fastvlm_convert.weights.parts import HEAD, part_of
from fastvlm_convert.weights.safetensors_file import Entries, Layout, lay_out
from fastvlm_convert.weights.source import CHUNK_BYTES, Weight
from fastvlm_convert.weights.storage import to_storage

MAX_SHARD_BYTES: Final = 5_000_000_000  # what model hosts ask for


def write_weights(
    work: Work, weights: MixedSource, recipe: Recipe, meter: ErrorMeter, on_progress: OnShare
) -> int:
    """Write all weights but those that an earlier run finished, whose bytes still are what it wrote.

    Args:
        work: The folder under construction.
        weights: Canonical names, folded; integers where planned, seen through `meter`.
        recipe: Decides the dtypes of floats.
        meter: Knows the errors of each weight once it was read.
        on_progress: Called with the share of the weights written, 0..1.

    Returns:
        How many weights an earlier run had finished.

    Raises:
        CheckpointError: A weight cannot be read.
        RecipeError: A weight is too large for the dtype the recipe stores it in.
        OSError: The disk is full.
    """
    layouts = _shards(work.folder, weights, recipe)
    num_resumed = _prepare(work, layouts)
    total = sum(_num_weights(weight) for weight in weights.values())
    done = 0
    for name, weight in weights.items():
        if name not in work.finished:
            layout = layouts[name]
            _write(layout, name, weight)
            to_disk(layout.path)
            sums = None if isinstance(weight, Weight) else asdict(meter.sums(name))
            work.finish(name, {"sums": sums, "sha256": _digest(layout, name)})
        done += _num_weights(weight)
        on_progress(done / total)
    return num_resumed


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
    files: dict[str, bytes] = {}
    for path in checkpoint.settings:
        if path != checkpoint.license:
            files[path.name] = _settings(path)
    if checkpoint.license is not None:
        files |= license_files(checkpoint.license, plan.recipe, QUANTIZED_CHECKPOINT.name)
    layers = layer_reports(plan.layers, lambda name: SquaredSums(**work.finished[name]["sums"]))
    record = Quantization(tool, source, plan.recipe, layers)
    files[FILE_NAME] = record.to_json().encode()
    work.claim(files)
    for name, content in files.items():
        (work.folder / name).write_bytes(content)
    return record


def _settings(path: Path) -> bytes:
    try:
        return read_file(path, MAX_TEXT_BYTES)
    except OSError as error:  # of the input, which is no full disk
        hint = "see that you may read it"
        raise CheckpointError(f"cannot read: {error.strerror}", where=path, hint=hint) from error


def _prepare(work: Work, layouts: Mapping[str, Layout]) -> int:
    """Make the files, unless an earlier run left them; how many weights it had finished."""
    files = list({layout.path: layout for layout in layouts.values()}.values())
    index = _index(files) if len(files) > 1 else {}
    work.claim([*(layout.path.name for layout in files), *index])
    finished = dict(work.finished)
    if not all(_is_whole(layout) for layout in files):
        work.finished.clear()
        for layout in files:
            layout.create()
    for name in list(work.finished):
        notes = work.finished[name]
        if name not in layouts or notes != {**notes, "sha256": _digest(layouts[name], name)}:
            del work.finished[name]
    for name, content in index.items():
        (work.folder / name).write_bytes(content)
    if lost := len(finished) - len(work.finished):
        work.say(f"{lost} weights that an interrupted run had written were damaged and were written again")
    return len(work.finished)


def _is_whole(layout: Layout) -> bool:
    """Whether a file has the size and the header that it should have."""
    try:
        with open_file(layout.path) as file:
            header = file.read(len(layout.header))
            return header == layout.header and layout.path.stat().st_size == layout.size
    except OSError:
        return False


def _digest(layout: Layout, name: str) -> str:
    """SHA-256 of a weight's bytes in its file: of all its parts, in their order."""
    parts = [tensor for part, tensor in layout.tensors.items() if part == name or part.startswith(f"{name}.")]
    digest = hashlib.sha256()
    with open_file(layout.path) as file:
        for tensor in parts:
            file.seek(tensor.offset)
            left = tensor.num_bytes
            while left and (piece := file.read(min(left, CHUNK_BYTES))):
                digest.update(piece)
                left -= len(piece)
    return digest.hexdigest()


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


def _index(files: Sequence[Layout]) -> dict[str, bytes]:
    tensors = {name: tensor for layout in files for name, tensor in layout.tensors.items()}
    index = {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors.values())},
        "weight_map": {name: tensors[name].path.name for name in sorted(tensors)},
    }
    text = json.dumps(index, indent=2, allow_nan=False) + "\n"
    return {"model.safetensors.index.json": text.encode()}


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
