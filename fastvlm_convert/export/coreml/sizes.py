"""Sizes of the Core ML packages, counted without coremltools: it takes seconds and loads torch where it can.

`weight.bin` is exact. It is a header of 64 bytes and, for every array of ten elements or more, a record of 64
bytes and the elements, each begun on a multiple of 64 (`MILBlob/Blob/StorageFormat.hpp` of coremltools).
"""

from collections.abc import Iterator

from fastvlm_convert.contract import FloatName, decoder_op, vision_op
from fastvlm_convert.export.coreml.paths import APPLE_PACKAGE, DECODER_PACKAGE, FILES, VISION_PACKAGE
from fastvlm_convert.recipe import FloatSettings, Recipe
from fastvlm_convert.weights.config import DecoderConfig, ModelConfig
from fastvlm_convert.weights.quantized import (
    AnyWeight,
    MixedSource,
    PaletteWeight,
    QuantizedWeight,
    dense_view,
)

_ALIGNMENT = 64
_SMALLEST = 10  # elements; smaller arrays stand in the program
_BITS: dict[FloatName, int] = {"float32": 32, "float16": 16}
_INT32 = 32

Blob = tuple[int, int]  # elements and bits of each


def coreml_sizes(config: ModelConfig, weights: MixedSource, recipe: Recipe) -> dict[str, int]:
    """Bytes of every file of the packages, by its path relative to the bundle.

    Args:
        config: Dimensions, with the image size to export.
        weights: Only shapes and schemes matter; nothing is read.
        recipe: Precisions and settings.
    """
    blobs = {
        VISION_PACKAGE: vision_blobs(weights, recipe.vision, projector=True),
        DECODER_PACKAGE: decoder_blobs(config.decoder, weights, recipe),
    }
    if recipe.coreml.drop_in:
        floats = FloatSettings("float32", "float32")
        blobs[APPLE_PACKAGE] = vision_blobs(dense_view(weights), floats, projector=False)
    return {f"{package}/{FILES[2]}": blob_file_bytes(found) for package, found in blobs.items()}


def blob_file_bytes(blobs: Iterator[Blob]) -> int:
    """Bytes of a `weight.bin`."""
    size = _ALIGNMENT
    for elements, bits in blobs:
        if elements >= _SMALLEST:
            size += _aligned(_ALIGNMENT) + _aligned(-(-elements * bits // 8))
    return size


def _aligned(size: int) -> int:
    return size + -size % _ALIGNMENT


def vision_blobs(weights: MixedSource, precision: FloatSettings, *, projector: bool) -> Iterator[Blob]:
    """Of the vision package, or of the one for Apple's app, which has no projector."""
    zeros: set[tuple[int, FloatName]] = set()
    for name, weight in weights.items():
        if not name.startswith(("vision.", "projector.") if projector else "vision."):
            continue
        layer = name.rpartition(".")[0]
        compute = precision.computes_in(_vision_op_name(layer))
        yield from _blobs(weight, precision.storage, compute)
        if name.endswith(".weight") and f"{layer}.bias" not in weights:
            zeros.add((weight.shape[0], compute))
    yield from ((rows, _BITS[dtype]) for rows, dtype in zeros)


def decoder_blobs(config: DecoderConfig, weights: MixedSource, recipe: Recipe) -> Iterator[Blob]:
    """Of the decoder package; its functions share them."""
    precision = recipe.decoder
    zeros: set[tuple[int, FloatName]] = {(config.vocab_size, precision.computes_in("lm_head"))}
    for i in range(config.num_layers):
        layer = f"decoder.layers.{i}"
        projections = [f"{layer}.self_attn.{p}_proj" for p in "qkv"]
        yield from _stacked([weights[f"{p}.weight"] for p in projections], precision, decoder_op(i, "qkv"))
        yield from _stacked([weights[f"{p}.bias"] for p in projections], precision, decoder_op(i, "qkv"))
        for part, module in _LINEARS.items():
            weight, op = weights[f"{layer}.{module}.weight"], decoder_op(i, part)
            yield from _stacked([weight], precision, op)
            zeros.add((weight.shape[0], precision.computes_in(op)))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield from _stacked([weights[f"{layer}.{norm}.weight"]], precision, "")
    yield from _stacked([weights["decoder.norm.weight"]], precision, "")
    for table in ("embed_tokens",) if config.tied else ("embed_tokens", "lm_head"):
        yield from _stacked([weights[f"decoder.{table}.weight"]], precision, "lm_head")
    yield from ((rows, _BITS[dtype]) for rows, dtype in zeros)
    yield from _positions(config, recipe)


_LINEARS = {"o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


def _positions(config: DecoderConfig, recipe: Recipe) -> Iterator[Blob]:
    """The rotary tables, and numbers of rows and columns for the mask in each function that makes one."""
    context, chunk = recipe.common.max_context_length, recipe.coreml.prefill_chunk
    for _ in ("cos", "sin"):
        yield context * config.head_dim, _BITS[recipe.decoder.storage]
    for tokens in (1, chunk) if recipe.coreml.sequence_lengths == "fixed" else (chunk,):
        yield tokens, _INT32
        yield context, _INT32


def _stacked(weights: list[AnyWeight], precision: FloatSettings, op: str) -> Iterator[Blob]:
    parts = [list(_blobs(w, precision.storage, precision.computes_in(op))) for w in weights]
    for same in zip(*parts, strict=True):
        yield sum(elements for elements, _ in same), same[0][1]


def _blobs(weight: AnyWeight, storage: FloatName, compute: FloatName) -> Iterator[Blob]:
    """Arrays of one weight. Scales and tables have the dtype in which the runtime multiplies."""
    if isinstance(weight, QuantizedWeight):
        scheme, blocks = weight.scheme, weight.rows * weight.scheme.num_blocks(weight.columns)
        yield weight.rows * weight.columns, scheme.bits
        yield blocks, _BITS[compute]
        if not scheme.symmetric:
            yield blocks, scheme.bits
    elif isinstance(weight, PaletteWeight):
        palette = weight.scheme
        yield weight.rows * weight.columns, palette.bits
        yield palette.num_groups(weight.rows) * palette.levels, _BITS[compute]
        if palette.per_channel_scale:
            yield weight.rows, _BITS[compute]
    else:
        yield weight.size, _BITS[storage]


def _vision_op_name(layer: str) -> str:
    """The operation that reads a layer's weight."""
    match layer.split("."):
        case ["vision", "stem", i]:
            return f"stem_{i}"
        case ["vision", "stages", s, "downsample", i]:
            return f"s{s}_down_{i}"
        case ["vision", "stages", s, "position"]:
            return f"s{s}_position"
        case ["vision", "stages", s, "blocks", b, *_, part]:
            return vision_op(int(s), int(b), "ffn_conv" if part == "conv" else part)
        case ["vision", "final", *_, part]:
            return "final" if part == "conv" else f"se_{part}"
        case _:
            return layer.replace(".", "_")
