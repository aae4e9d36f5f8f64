"""`fastvlm-convert inspect`: what a checkpoint is; reads headers only."""

import dataclasses
from collections import Counter
from typing import Any

from rich.markup import escape as escape_markup
from rich.table import Table

from fastvlm_convert.arithmetic import num_elements
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.checkpoint.quantized_checkpoint import Quantization
from fastvlm_convert.cli.console import out, print_json, size_text
from fastvlm_convert.cli.layers import layers_document, layers_table
from fastvlm_convert.cli.options import AdapterOption, CheckpointArgument, JsonOption, VerboseOption
from fastvlm_convert.errors import printable
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.weights.file_tensors import item_size
from fastvlm_convert.weights.parts import is_language, part_of

_FEW = 3  # unused tensors named in the table


def escape(text: str) -> str:
    """Text from a file, safe to print."""
    return escape_markup(printable(text))


def command(
    checkpoint: CheckpointArgument,
    adapter: AdapterOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what a checkpoint is: dimensions, sizes, tokenizer, what is unused or contradicts itself."""
    opened = open_checkpoint(checkpoint, adapter)
    facts = describe(opened)
    if as_json:
        print_json("inspect", "passed", **facts)
    else:
        _print(opened, facts)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything `inspect` knows, as plain data."""
    config, decoder = checkpoint.config, checkpoint.config.decoder
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
    vision, decoder = checkpoint.config.vision, checkpoint.config.decoder
    parameters = facts["parameters"]
    stored = ", ".join(f"{size_text(n)} {dtype}" for dtype, n in facts["stored_bytes"].items())
    widths = " ".join(f"{s.width}" for s in vision.stages)
    depths = " ".join(f"{s.depth}" for s in vision.stages)
    attention = sum(s.mixer == "attention" for s in vision.stages)
    tied = "tied to the embedding" if decoder.tied else "untied"
    rows = [
        ("layout", f"{checkpoint.layout}, {stored}"),
        (
            "vision",
            f"{parameters['vision'] / 1e6:.2f} M parameters; widths {widths}, depths {depths} "
            f"(last {attention} attention); features {vision.output_width}",
        ),
        (
            "image",
            f"{vision.image_size} pixels, {checkpoint.image_mode}; {vision.num_image_tokens} tokens an image",
        ),
        (
            "projector",
            f"{parameters['projector'] / 1e6:.2f} M parameters; hidden {facts['projector_width']}",
        ),
        (
            "decoder",
            f"{parameters['decoder'] / 1e6:.2f} M parameters; {decoder.num_layers} layers, "
            f"{decoder.hidden_size} wide, {decoder.num_heads} query and {decoder.num_kv_heads} KV heads "
            f"of {decoder.head_dim}, MLP {decoder.intermediate_size}",
        ),
        (
            "vocabulary",
            f"{decoder.vocab_size} rows, head {tied}; tokenizer has {checkpoint.tokenizer.num_tokens} ids",
        ),
        ("KV cache", f"{size_text(_cache_bytes(checkpoint))} a token in float16"),
        ("tokenizer", ", ".join(facts["tokenizer"]["files"])),
        ("ends at", ", ".join(str(i) for i in checkpoint.eos_token_ids)),
        ("license", facts["license"] or "[yellow]not found[/]"),
    ]
    table = Table(
        title=escape(str(checkpoint.path)),
        title_justify="left",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
    )
    for name, value in rows:
        table.add_row(f"[bold]{name}[/]", value)
    if checkpoint.quantized is not None:
        record = checkpoint.quantized.record
        table.add_row("[bold]quantized[/]", f"recipe {escape(record.recipe.name)}, by {escape(record.tool)}")
        table.add_row("[bold]made from[/]", f"sha256 {escape(record.source.sha256)}")
    if checkpoint.unused:
        shown = ", ".join(name.rpartition("model.")[2] for name in checkpoint.unused[:_FEW])
        more = len(checkpoint.unused) - _FEW
        table.add_row(
            "[bold]unused[/]", escape(shown) + (f" and {more} more (--json lists them)" if more > 0 else "")
        )
    for d in checkpoint.disagreements:
        table.add_row("[yellow]config[/]", escape(f"{d.key} is {d.config}, the tensors say {d.tensors}"))
    out.print(table)
    if checkpoint.quantized is not None:
        out.print()
        out.print(layers_table(checkpoint.quantized.record.layers))
