"""`fastvlm-convert inspect`: what a checkpoint is; reads headers only."""

import dataclasses
import json
from collections import Counter
from typing import Any

import typer
from rich.markup import escape as escape_markup

from fastvlm_convert.arithmetic import num_elements
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.checkpoint.quantized_checkpoint import Quantization
from fastvlm_convert.cli.console import out, plain_table, report, size_text
from fastvlm_convert.cli.layers import layers_document, layers_table
from fastvlm_convert.cli.options import (
    AdapterOption,
    CheckpointArgument,
    ProjectorOption,
    VisionTowerOption,
)
from fastvlm_convert.errors import printable
from fastvlm_convert.preprocess import ImageSettings
from fastvlm_convert.prompt import PromptFormat
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.weights.file_tensors import item_size
from fastvlm_convert.weights.parts import is_language, part_of

EXAMPLES = """
fastvlm-convert inspect FastVLM-0.5B
fastvlm-convert inspect FastVLM-0.5B --adapter my-lora --json
"""
_FEW = 3  # unused tensors named in the table


def escape(text: str) -> str:
    """Text from a file, safe to print."""
    return escape_markup(printable(text))


def command(
    context: typer.Context,
    checkpoint: CheckpointArgument,
    adapter: AdapterOption = None,
    projector: ProjectorOption = None,
    vision_tower: VisionTowerOption = None,
) -> None:
    """Show what a checkpoint contains.

    Its dimensions, sizes and tokenizer, the tensors that the model does not use, and where config.json
    contradicts the tensors. Reads headers only, no weights.
    """
    opened = open_checkpoint(checkpoint, adapter, projector=projector, vision_tower=vision_tower)
    facts = describe(opened)
    report(context, "passed", facts, lambda: _print(opened, facts))


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything `inspect` knows, as plain data."""
    config, decoder = checkpoint.config, checkpoint.config.decoder
    images, prompt = checkpoint.pictures.image, checkpoint.prompt
    weights = checkpoint.weights if checkpoint.quantized is None else checkpoint.folded
    dtypes: Counter[str] = Counter()
    for weight in checkpoint.stored.values():
        dtypes[weight.dtype] += weight.size * item_size(weight.dtype)
    return {
        "checkpoint": str(checkpoint.path),
        "layout": checkpoint.layout,
        "parameters": _parameters(weights),
        "stored_bytes": dict(sorted(dtypes.items())),
        "vision": {
            "image_size": config.vision.image_size,
            "image_mode": checkpoint.image_mode,
            "resampling": images.resampling,
            "rescale_factor": images.rescale_factor,
            "image_mean": list(images.mean),
            "image_std": list(images.std),
            "found_in": dict(checkpoint.pictures.origins),
            "num_image_tokens": config.vision.num_image_tokens,
            "stages": [
                {"mixer": s.mixer, "width": s.width, "depth": s.depth, "ffn_width": s.ffn_width}
                for s in config.vision.stages
            ],
            "output_width": config.vision.output_width,
        },
        "projector_width": config.projector_width,
        "decoder": {**vars(decoder), "kv_cache_bytes_per_token_float16": _cache_bytes(checkpoint)},
        "tokenizer": {
            "files": [path.name for path in checkpoint.tokenizer.files],
            "num_tokens": checkpoint.tokenizer.num_tokens,
            "image_token_id": checkpoint.tokenizer.image_token_id,
            "eos_token_ids": list(checkpoint.eos_token_ids),
        },
        "quantized": None if checkpoint.quantized is None else _quantized(checkpoint.quantized.record),
        "license": None if checkpoint.license is None else checkpoint.license.name,
        "unused_tensors": list(checkpoint.unused),
        "prompt": {
            "format": dataclasses.asdict(prompt.format),
            "system_prompt": prompt.format.default_system,
            "single_turn": prompt.format.single_turn,
            "found_in": prompt.origin,
        },
        "notes": list(checkpoint.notes),
        "disagreements": [vars(d) for d in checkpoint.disagreements],
    }


def _parameters(weights: MixedSource) -> dict[str, int]:
    """Numbers in the encoder, the projector and the decoder with its head and embedding."""
    counts = dict.fromkeys(("vision", "projector", "decoder"), 0)
    for name, weight in weights.items():
        counts["decoder" if is_language(name) else part_of(name)] += num_elements(weight.shape)
    return counts


def _quantized(record: Quantization) -> dict[str, Any]:
    return {
        "recipe": record.recipe.to_dict(),
        "source": dataclasses.asdict(record.source),
        **layers_document(record.layers),
    }


def _cache_bytes(checkpoint: Checkpoint) -> int:
    decoder = checkpoint.config.decoder
    return 2 * 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim


def _print(checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
    table = plain_table()
    for name, value in [*_network_rows(checkpoint, facts), *_file_rows(checkpoint, facts)]:
        table.add_row(f"[bold]{name}[/]", value)
    for note in checkpoint.notes:
        table.add_row("[yellow]note[/]", escape(note))
    for d in checkpoint.disagreements:
        table.add_row("[yellow]config[/]", escape(f"{d.key} is {d.config}, the tensors say {d.tensors}"))
    out.print(f"[bold]{escape(str(checkpoint.path))}[/]", soft_wrap=True)
    out.print(table)
    if checkpoint.quantized is not None:
        out.print()
        out.print(layers_table(checkpoint.quantized.record.layers))


def _network_rows(checkpoint: Checkpoint, facts: dict[str, Any]) -> list[tuple[str, str]]:
    vision, decoder = checkpoint.config.vision, checkpoint.config.decoder
    millions = {name: f"{count / 1e6:.2f} M parameters" for name, count in facts["parameters"].items()}
    widths = " ".join(f"{s.width}" for s in vision.stages)
    depths = " ".join(f"{s.depth}" for s in vision.stages)
    attention = sum(s.mixer == "attention" for s in vision.stages)
    tied = "tied to the embedding" if decoder.tied else "untied"
    origins = {name: escape(origin) for name, origin in checkpoint.pictures.origins.items()}
    stored = ", ".join(f"{size_text(n)} {dtype}" for dtype, n in facts["stored_bytes"].items())
    return [
        ("layout", f"{checkpoint.layout}; {stored}"),
        (
            "vision",
            f"{millions['vision']}; widths {widths}; depths {depths}, "
            f"attention in the last {attention}; {vision.output_width} features",
        ),
        (
            "image",
            f"{vision.image_size} pixels square, {vision.num_image_tokens} tokens ({origins['image_size']})",
        ),
        ("image mode", f"{checkpoint.image_mode} ({origins['image_mode']})"),
        ("normalization", f"{_normalization(checkpoint.pictures.image)} ({origins['normalization']})"),
        ("projector", f"{millions['projector']}; hidden size {facts['projector_width']}"),
        (
            "decoder",
            f"{millions['decoder']}; {decoder.num_layers} layers, hidden size {decoder.hidden_size}, "
            f"{decoder.num_heads} query and {decoder.num_kv_heads} KV heads of {decoder.head_dim}, "
            f"MLP size {decoder.intermediate_size}",
        ),
        (
            "vocabulary",
            f"{decoder.vocab_size} rows, head {tied}; tokenizer with {checkpoint.tokenizer.num_tokens} ids",
        ),
        ("KV cache", f"{size_text(_cache_bytes(checkpoint))} per token in float16"),
    ]


def _file_rows(checkpoint: Checkpoint, facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("tokenizer", ", ".join(facts["tokenizer"]["files"])),
        ("prompt", f"{escape(checkpoint.prompt.origin)}; {_system(checkpoint.prompt.format)}"),
        ("template", escape(json.dumps(checkpoint.prompt.format.single_turn, ensure_ascii=False))),
        ("end tokens", ", ".join(str(i) for i in checkpoint.eos_token_ids)),
        ("license", facts["license"] or "[yellow]not found[/]"),
    ]
    if checkpoint.quantized is not None:
        record = checkpoint.quantized.record
        rows += [
            ("quantized", f"recipe {escape(record.recipe.name)}, by fastvlm-convert {escape(record.tool)}"),
            ("source", escape(record.source.sha256)),
        ]
    if checkpoint.unused:
        shown = ", ".join(name.rpartition("model.")[2] for name in checkpoint.unused[:_FEW])
        more = len(checkpoint.unused) - _FEW
        rows.append(("unused", escape(shown) + (f" and {more} more (--json lists them)" if more > 0 else "")))
    return rows


def _normalization(images: ImageSettings) -> str:
    """How 8-bit values are scaled, in words."""
    scaled = "0..1" if images.rescale_factor == 1 / 255 else f"times {images.rescale_factor:g}"
    if not images.is_normalized:
        return scaled
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (images.mean, images.std))
    return f"{scaled}, mean {mean}, std {std}"


def _system(prompt_format: PromptFormat) -> str:
    default = prompt_format.default_system
    if default is not None:
        return f"system prompt {escape(json.dumps(default, ensure_ascii=False))}"
    return "no system prompt" if prompt_format.system_before is None else "no system prompt by default"
