"""`fastvlm-convert inspect`: what a checkpoint is; reads headers only."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import typer
from rich.markup import escape as escape_markup

from fastvlm_convert.amounts import size_text
from fastvlm_convert.arithmetic import num_elements
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.checkpoint.dimensions import Disagreement
from fastvlm_convert.checkpoint.layouts import Layout
from fastvlm_convert.checkpoint.quantized_checkpoint import Quantization
from fastvlm_convert.cli.console import out, plain_table, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.layers import layers_table
from fastvlm_convert.cli.options import (
    AdapterOption,
    CheckpointArgument,
    ProjectorOption,
    VisionTowerOption,
)
from fastvlm_convert.errors import printable
from fastvlm_convert.manifest import Source
from fastvlm_convert.preprocess import ImageMode, ImageSettings, Resampling
from fastvlm_convert.prompt import PromptFormat
from fastvlm_convert.quantized.layer_report import ComponentReport, LayerReport, component_reports
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.resolved_recipe import ResolvedRecipe
from fastvlm_convert.weights.file_tensors import item_size
from fastvlm_convert.weights.model_config import DecoderConfig
from fastvlm_convert.weights.parts import is_language, part_of

EXAMPLES = """
fastvlm-convert inspect FastVLM-0.5B
fastvlm-convert inspect FastVLM-0.5B --adapter my-lora --json
"""
_FEW = 3  # unused tensors named in the table


def escape(text: str) -> str:
    """Text from a file, safe to print."""
    return escape_markup(printable(text))


@dataclass(frozen=True)
class ParameterFacts:
    """Numbers in the encoder, the projector, and the decoder with its head and embedding."""

    vision: int
    projector: int
    decoder: int


@dataclass(frozen=True)
class StageFacts:
    """One stage of the encoder; see `StageConfig`."""

    mixer: Literal["conv", "attention"]
    width: int
    depth: int
    ffn_width: int


@dataclass(frozen=True)
class VisionFacts:
    """The encoder, and how pictures are prepared for it.

    Attributes:
        image_size: Edge of the square input in pixels.
        image_mode: How an image is made square.
        resampling: Pillow's filter that resizes it.
        rescale_factor: What its 8-bit values are multiplied by.
        image_mean: Subtracted then, by channel.
        image_std: What the result is divided by, by channel.
        found_in: Where each of those settings was found.
        num_image_tokens: Tokens one image becomes.
        stages: The stages in order.
        output_width: Channels of the features.
    """

    image_size: int
    image_mode: ImageMode
    resampling: Resampling
    rescale_factor: float
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    found_in: dict[str, str]
    num_image_tokens: int
    stages: tuple[StageFacts, ...]
    output_width: int


@dataclass(frozen=True, kw_only=True)
class DecoderFacts(DecoderConfig):
    """The decoder, and what a token takes in its cache."""

    kv_cache_bytes_per_token_float16: int


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer.

    Attributes:
        files: Names of its files.
        num_tokens: Ids that it knows.
        image_token_id: Id of the picture's placeholder.
        eos_token_ids: Ids at which an answer ends.
    """

    files: tuple[str, ...]
    num_tokens: int
    image_token_id: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class QuantizedFacts:
    """How a quantized checkpoint was made.

    Attributes:
        recipe: Every setting.
        source: The float checkpoint.
        components: Layers by component, and the total.
        layers: Every layer.
    """

    recipe: ResolvedRecipe
    source: Source
    components: tuple[ComponentReport, ...]
    layers: tuple[LayerReport, ...]


@dataclass(frozen=True)
class PromptFacts:
    """How conversations become text.

    Attributes:
        format: The texts around the turns.
        system_prompt: System message of a conversation that brings none.
        single_turn: One picture and one question, with {question} where the user's text goes.
        found_in: Where it was found.
    """

    format: PromptFormat
    system_prompt: str | None
    single_turn: str
    found_in: str


@dataclass(frozen=True)
class InspectDocument(Document, name="inspect"):
    """What a checkpoint contains.

    Attributes:
        checkpoint: Its folder.
        layout: Whose layout it has.
        parameters: By part.
        stored_bytes: By dtype.
        vision: The encoder.
        projector_width: Hidden width of the projector.
        decoder: The language model.
        tokenizer: The tokenizer.
        quantized: How its integers were made; None in float.
        license: The license's file, if there is one.
        unused_tensors: Tensors that the model does not use.
        prompt: How conversations become text.
        notes: What its files say and this tool does otherwise.
        disagreements: Where config.json contradicts the tensors.
    """

    checkpoint: str
    layout: Layout
    parameters: ParameterFacts
    stored_bytes: dict[str, int]
    vision: VisionFacts
    projector_width: int
    decoder: DecoderFacts
    tokenizer: TokenizerFacts
    quantized: QuantizedFacts | None
    license: str | None
    unused_tensors: tuple[str, ...]
    prompt: PromptFacts
    notes: tuple[str, ...]
    disagreements: tuple[Disagreement, ...]


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


def describe(checkpoint: Checkpoint) -> InspectDocument:
    """Everything `inspect` knows."""
    prompt = checkpoint.prompt
    weights = checkpoint.weights if checkpoint.quantized is None else checkpoint.folded
    dtypes: Counter[str] = Counter()
    for weight in checkpoint.stored.values():
        dtypes[weight.dtype] += weight.size * item_size(weight.dtype)
    return InspectDocument(
        checkpoint=str(checkpoint.path),
        layout=checkpoint.layout,
        parameters=_parameters(weights),
        stored_bytes=dict(sorted(dtypes.items())),
        vision=_vision(checkpoint),
        projector_width=checkpoint.config.projector_width,
        decoder=DecoderFacts(
            **vars(checkpoint.config.decoder), kv_cache_bytes_per_token_float16=_cache_bytes(checkpoint)
        ),
        tokenizer=TokenizerFacts(
            files=tuple(path.name for path in checkpoint.tokenizer.files),
            num_tokens=checkpoint.tokenizer.num_tokens,
            image_token_id=checkpoint.tokenizer.image_token_id,
            eos_token_ids=checkpoint.eos_token_ids,
        ),
        quantized=None if checkpoint.quantized is None else _quantized(checkpoint.quantized.record),
        license=None if checkpoint.license is None else checkpoint.license.name,
        unused_tensors=checkpoint.unused,
        prompt=PromptFacts(
            format=prompt.format,
            system_prompt=prompt.format.default_system,
            single_turn=prompt.format.single_turn,
            found_in=prompt.origin,
        ),
        notes=checkpoint.notes,
        disagreements=checkpoint.disagreements,
    )


def _vision(checkpoint: Checkpoint) -> VisionFacts:
    vision, images = checkpoint.config.vision, checkpoint.pictures.image
    return VisionFacts(
        image_size=vision.image_size,
        image_mode=checkpoint.image_mode,
        resampling=images.resampling,
        rescale_factor=images.rescale_factor,
        image_mean=images.mean,
        image_std=images.std,
        found_in={str(setting): origin for setting, origin in checkpoint.pictures.origins.items()},
        num_image_tokens=vision.num_image_tokens,
        stages=tuple(StageFacts(s.mixer, s.width, s.depth, s.ffn_width) for s in vision.stages),
        output_width=vision.output_width,
    )


def _parameters(weights: MixedSource) -> ParameterFacts:
    counts = dict.fromkeys(("vision", "projector", "decoder"), 0)
    for name, weight in weights.items():
        counts["decoder" if is_language(name) else part_of(name)] += num_elements(weight.shape)
    return ParameterFacts(**counts)


def _quantized(record: Quantization) -> QuantizedFacts:
    return QuantizedFacts(record.recipe, record.source, component_reports(record.layers), record.layers)


def _cache_bytes(checkpoint: Checkpoint) -> int:
    decoder = checkpoint.config.decoder
    return 2 * 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim


def _print(checkpoint: Checkpoint, facts: InspectDocument) -> None:
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


def _network_rows(checkpoint: Checkpoint, facts: InspectDocument) -> list[tuple[str, str]]:
    vision, decoder = checkpoint.config.vision, checkpoint.config.decoder
    millions = {name: f"{count / 1e6:.2f} M parameters" for name, count in vars(facts.parameters).items()}
    widths = " ".join(f"{s.width}" for s in vision.stages)
    depths = " ".join(f"{s.depth}" for s in vision.stages)
    attention = sum(s.mixer == "attention" for s in vision.stages)
    tied = "tied to the embedding" if decoder.tied else "untied"
    origins = {name: escape(origin) for name, origin in checkpoint.pictures.origins.items()}
    stored = ", ".join(f"{size_text(n)} {dtype}" for dtype, n in facts.stored_bytes.items())
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
        ("projector", f"{millions['projector']}; hidden size {facts.projector_width}"),
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


def _file_rows(checkpoint: Checkpoint, facts: InspectDocument) -> list[tuple[str, str]]:
    rows = [
        ("tokenizer", ", ".join(facts.tokenizer.files)),
        ("prompt", f"{escape(checkpoint.prompt.origin)}; {_system(checkpoint.prompt.format)}"),
        ("template", escape(json.dumps(checkpoint.prompt.format.single_turn, ensure_ascii=False))),
        ("end tokens", ", ".join(str(i) for i in checkpoint.eos_token_ids)),
        ("license", facts.license or "[yellow]not found[/]"),
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
