"""The weights of a checkpoint and what is given beside it, under canonical names; headers only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_convert.checkpoint.adapter import EMBED, HEAD, Adapter, merge_adapter
from fastvlm_convert.checkpoint.dimensions import check_shapes, check_supported, infer_config, text_config
from fastvlm_convert.checkpoint.foreign import refuse_other_tensors
from fastvlm_convert.checkpoint.layouts import LAYOUTS, Layout, canonical_names, layout_of
from fastvlm_convert.checkpoint.picture_settings import PictureSettings, picture_settings
from fastvlm_convert.checkpoint.quantized_checkpoint import FILE_NAME as QUANTIZED_FILE
from fastvlm_convert.checkpoint.quantized_checkpoint import QuantizedContent, quantized_content, read_record
from fastvlm_convert.checkpoint.separate_parts import read_projector, read_tower
from fastvlm_convert.checkpoint.weight_files import (
    FLOAT_READERS,
    read_tensors,
    refuse_empty,
    without_wrappers,
)
from fastvlm_convert.errors import CheckpointError, shown
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.parts import part_of
from fastvlm_convert.weights.reparameterize import reparameterize
from fastvlm_convert.weights.safetensors_file import read_header
from fastvlm_convert.weights.shapes import convolutions, weight_shapes
from fastvlm_convert.weights.source import Weight, reshaped, same_content
from fastvlm_convert.weights.storage import checked


@dataclass(frozen=True)
class Parts:
    """What is given beside a checkpoint, as `open_checkpoint` takes it."""

    adapter: Adapter | None
    projector: Path | None
    vision_tower: Path | None


@dataclass(frozen=True)
class Content:
    """What the files that hold weights give.

    Attributes:
        tokenizer: The folder to read the tokenizer from.
        files: Every file that was read.
        notes: What was odd and how it was read.
        layout, pictures, config, weights, quantized, stored, unused: As in `Checkpoint`.
    """

    layout: Layout
    pictures: PictureSettings
    config: ModelConfig
    weights: Mapping[str, Weight]
    quantized: QuantizedContent | None
    stored: Mapping[str, Weight]
    unused: tuple[str, ...]
    files: list[Path]
    notes: tuple[str, ...]
    tokenizer: Path


def read_float(path: Path, raw: Mapping[str, Any], parts: Parts) -> Content:
    """Find the weights of a float checkpoint, and put what is given beside it into them.

    Args:
        path: Its folder.
        raw: The parsed config.json.
        parts: What is given beside it.

    Raises:
        CheckpointError: Files are missing or damaged, or hold no float weights of a FastVLM.
    """
    found = without_wrappers(read_tensors(path, FLOAT_READERS))
    stored, files = found.tensors, found.files
    refuse_other_tensors(stored, path)
    for name, weight in stored.items():
        if weight.shape == (0,):
            refuse_empty(name, weight.shape, path)
    layout, notes = _layout(raw, stored, path)
    check_supported(raw, layout, path)
    pictures = picture_settings(raw, layout, path)
    names = canonical_names(stored, layout)
    weights = {ours: stored[name] for name, ours in names.items()}
    for part, file, read in (
        ("projector", parts.projector, read_projector),
        ("vision", parts.vision_tower, read_tower),
    ):
        if file is not None:
            weights = {name: w for name, w in weights.items() if part_of(name) != part} | read(file)
            names = {name: ours for name, ours in names.items() if part_of(ours) != part}
            files = [*files, file]
    adapter = parts.adapter
    if adapter is not None:
        # Apple's names tell the stage only beside each other, so the checkpoint's stand with the adapter's.
        targets = canonical_names([*stored, *adapter.names], adapter.layout or layout)
        tied = EMBED in weights and _is_tied(text_config(raw, layout), raw, weights)
        weights = merge_adapter(weights, adapter, targets, stored, tied)
        files = [*files, *adapter.files]
    config = infer_config(weights, raw, layout, pictures.image.size, path)
    merged = reparameterize(weights, list(convolutions(config.vision)))
    weights = checked(merged, weights, "merging train-time branches")
    expected = weight_shapes(config)
    check_shapes(weights, expected, path)
    weights = {name: reshaped(weights[name], shape) for name, shape in expected.items()}
    return Content(
        layout=layout,
        pictures=pictures,
        config=config,
        weights=weights,
        quantized=None,
        stored=stored,
        unused=tuple(_unused(stored, names, weights, config)),
        files=files,
        notes=(*found.notes, *notes, *(() if adapter is None else adapter.notes)),
        tokenizer=path if adapter is None or adapter.tokenizer is None else adapter.tokenizer,
    )


def read_quantized(path: Path, raw: Mapping[str, Any], has_parts: bool) -> Content:
    """Find the weights of a quantized checkpoint.

    Args:
        path: Its folder.
        raw: The parsed config.json.
        has_parts: Whether anything is given beside it.

    Raises:
        CheckpointError: Something is, or files are missing, damaged or do not fit together.
    """
    if has_parts:
        raise CheckpointError(
            "an adapter cannot be merged into quantized weights, nor a part replaced",
            where=path,
            hint="merge it before: fastvlm-convert quantize CHECKPOINT --adapter FOLDER",
        )
    layout, _ = _layout(raw, (), path)
    check_supported(raw, layout, path)
    pictures = picture_settings(raw, layout, path)
    record = read_record(path)
    found = read_tensors(path, {"model.safetensors": read_header})
    config, content, unused = quantized_content(record, found.tensors, raw, layout, pictures.image.size, path)
    stored = {name: tensor.weight() for name, tensor in found.tensors.items()}
    return Content(
        layout=layout,
        pictures=pictures,
        config=config,
        weights={},
        quantized=content,
        stored=stored,
        unused=unused,
        files=[path / QUANTIZED_FILE, *found.files],
        notes=found.notes,
        tokenizer=path,
    )


def _is_tied(text: Mapping[str, Any], raw: Mapping[str, Any], weights: Mapping[str, Weight]) -> bool:
    """Whether embedding and head are one table, which then may be stored once or twice."""
    if HEAD not in weights:
        return True
    said = raw.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return said is True and same_content(weights[HEAD], weights[EMBED])


def _layout(raw: Mapping[str, Any], stored: Iterable[str], path: Path) -> tuple[Layout, tuple[str, ...]]:
    """Whose layout it is, and a note where config.json does not say so but the tensors do."""
    model_type = raw.get("model_type")
    for layout in LAYOUTS:
        if model_type == layout:
            return layout, ()
    found = layout_of(stored)
    if found is None:
        raise CheckpointError(
            f"model_type is {shown(model_type)}; supported: {', '.join(repr(name) for name in LAYOUTS)}",
            where=path / "config.json",
            hint="give a FastVLM checkpoint in Apple's or transformers' layout",
        )
    return found, (f"model_type is {shown(model_type)}; by its tensors it is read as {found}",)


def _unused(
    stored: Mapping[str, Weight],
    names: Mapping[str, str],
    weights: Mapping[str, Weight],
    config: ModelConfig,
) -> list[str]:
    """Stored tensors that neither are a weight nor went into one as a train-time branch."""
    blocks = tuple(f"{block}." for block in convolutions(config.vision))
    return sorted(
        name
        for name in stored
        if names.get(name) not in weights and not names.get(name, "").startswith(blocks)
    )
