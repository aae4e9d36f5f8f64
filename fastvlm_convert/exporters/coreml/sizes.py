"""Sizes of the Core ML packages, counted without coremltools: it takes seconds and loads torch where it can.

`weight.bin` is exact to its last 63 bytes. It is a header of 64 bytes and, for every array of ten elements or
more, a record of 64 bytes and the elements, each begun on a multiple of 64 (`StorageFormat.hpp` there).
`model.mlmodel` holds no weights but the operations with their names, about 130 bytes each; it is estimated
from the number of layers, within 1 % of what was measured for shipped recipes at two sizes of the model.
"""

from collections.abc import Iterable, Iterator

from fastvlm_convert.exporters.coreml.paths import APPLE_PACKAGE, DECODER_PACKAGE, FILES, VISION_PACKAGE
from fastvlm_convert.io_names import FloatName, decoder_op, vision_op
from fastvlm_convert.quantized.schemes import PaletteScheme, Scheme
from fastvlm_convert.quantized.weight import (
    AnyWeight,
    MixedSource,
    PaletteWeight,
    QuantizedWeight,
    dense_view,
)
from fastvlm_convert.recipe import FloatSettings, Recipe
from fastvlm_convert.weights.model_config import DecoderConfig, ModelConfig
from fastvlm_convert.weights.parts import is_language, part_of
from fastvlm_convert.weights.source import Weight

_ALIGNMENT = 64
_SMALLEST = 10  # elements; smaller arrays stand in the program
_BITS: dict[FloatName, int] = {"float32": 32, "float16": 16}
_INT32 = 32

# Bytes in a program, fitted to packages of the demo checkpoint and of a model of FastVLM-0.5B's dimensions.
_MANIFEST_BYTES = 617  # Manifest.json, always
_FUNCTION = 700
_CONVOLUTION = 1424  # with its constants, its activation and its share of the additions
_VISION_LINEAR = 2348  # with its share of attention
_STEP: dict[FloatName, int] = {"float32": 6650, "float16": 8200}  # of the decoder, beside its layers
_LAYER: dict[FloatName, int] = {"float32": 15_690, "float16": 18_005}
_CAST = 297
_DEQUANTIZED: dict[FloatName, int] = {"float32": 103, "float16": 109}
_ZERO_POINTS = 75
_CHANNEL_SCALES = 255  # of a palette
_RESIDUAL_SCALE = 240
_FLOAT32_SCORES: dict[FloatName, int] = {"float32": 1530, "float16": 2460}
_KEY_BIAS: dict[FloatName, int] = {"float32": 4030, "float16": 4970}  # with its layer's float32 scores

Blob = tuple[int, int]  # elements and bits of each


def coreml_sizes(config: ModelConfig, weights: MixedSource, recipe: Recipe) -> dict[str, int]:
    """Bytes of every file of the packages, by its path relative to the bundle.

    Args:
        config: Dimensions, with the image size to export.
        weights: Only shapes and schemes matter; nothing is read.
        recipe: Precisions and settings.
    """
    vision = {n: w for n, w in weights.items() if not is_language(n)}
    decoder = {n: w for n, w in weights.items() if is_language(n)}
    sizes = _package(
        VISION_PACKAGE,
        blob_file_bytes(vision_blobs(vision, recipe.vision)),
        _vision_program(vision, recipe.vision),
    ) | _package(
        DECODER_PACKAGE,
        blob_file_bytes(decoder_blobs(config.decoder, decoder, recipe)),
        _decoder_program(config.decoder, decoder, recipe),
    )
    if recipe.coreml.drop_in:
        floats = FloatSettings("float32", "float32")
        encoder = dense_view({n: w for n, w in vision.items() if part_of(n) == "vision"})
        sizes |= _package(
            APPLE_PACKAGE,
            blob_file_bytes(vision_blobs(encoder, floats)),
            _vision_program(encoder, floats),
        )
    return sizes


def _package(package: str, blobs: int, program: int) -> dict[str, int]:
    return dict(zip((f"{package}/{file}" for file in FILES), (_MANIFEST_BYTES, program, blobs), strict=True))


def _vision_program(weights: MixedSource, precision: FloatSettings) -> int:
    matrices = [w for n, w in weights.items() if n.endswith(".weight") and len(w.shape) > 1]
    linears = sum(len(w.shape) == 2 for w in matrices)
    convolutions = len(matrices) - linears
    reads = _reads(weights.values(), precision)
    return _FUNCTION + convolutions * _CONVOLUTION + linears * _VISION_LINEAR + reads


def _decoder_program(config: DecoderConfig, weights: MixedSource, recipe: Recipe) -> int:
    steps = 2 if recipe.coreml.sequence_lengths == "fixed" else 1
    once = [w for n, w in weights.items() if ".k_proj." not in n and ".v_proj." not in n]
    reads = _reads(once, recipe.decoder)
    layers = config.num_layers * _LAYER[recipe.decoder.compute]
    repairs = _repairs_program(recipe)
    return _FUNCTION + steps * (_STEP[recipe.decoder.compute] + layers + reads + repairs)


def _repairs_program(recipe: Recipe) -> int:
    repairs, compute = recipe.repairs, recipe.decoder.compute
    biases = set(repairs.separate_key_bias)
    scores = set(repairs.float32_scores) - biases
    scaled = _RESIDUAL_SCALE if repairs.residual_shift else 0
    return scaled + len(scores) * _FLOAT32_SCORES[compute] + len(biases) * _KEY_BIAS[compute]


def _reads(weights: Iterable[AnyWeight], precision: FloatSettings) -> int:
    """Bytes of what stands between the arrays and the operations that read them."""
    total = 0
    for weight in weights:
        if isinstance(weight, Weight):
            total += _CAST if precision.storage != precision.compute else 0
        else:
            total += _DEQUANTIZED[precision.compute] + _more_parts(weight.scheme)
    return total


def _more_parts(scheme: Scheme) -> int:
    """Bytes of what stands in a program for parts that not every scheme has."""
    if isinstance(scheme, PaletteScheme):
        return _CHANNEL_SCALES if scheme.per_channel_scale else 0
    return 0 if scheme.symmetric else _ZERO_POINTS


def blob_file_bytes(blobs: Iterator[Blob]) -> int:
    """Bytes of a `weight.bin`."""
    size = _ALIGNMENT
    for elements, bits in blobs:
        if elements >= _SMALLEST:
            size += _aligned(_ALIGNMENT) + _aligned(-(-elements * bits // 8))
    return size


def _aligned(size: int) -> int:
    return size + -size % _ALIGNMENT


def vision_blobs(weights: MixedSource, precision: FloatSettings) -> Iterator[Blob]:
    """Of a vision package with just these weights."""
    zeros: set[tuple[int, FloatName]] = set()
    for name, weight in weights.items():
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
    yield from _key_biases(config, recipe)


_LINEARS = {"o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


def _positions(config: DecoderConfig, recipe: Recipe) -> Iterator[Blob]:
    """The rotary tables, and numbers of rows and columns for the mask in each function that makes one."""
    context, chunk = recipe.common.max_context_length, recipe.coreml.prefill_chunk
    for _ in ("cos", "sin"):
        yield context * config.head_dim, _BITS[recipe.decoder.storage]
    for tokens in (1, chunk) if recipe.coreml.sequence_lengths == "fixed" else (chunk,):
        yield tokens, _INT32
        yield context, _INT32


def _key_biases(config: DecoderConfig, recipe: Recipe) -> Iterator[Blob]:
    """Biases of keys that are kept apart, in two parts a layer, and the rotary columns they share."""
    layers = set(recipe.repairs.separate_key_bias)
    for _ in layers:
        yield from [(config.num_kv_heads * config.head_dim, _BITS["float32"])] * 2
    if layers:
        yield config.head_dim * recipe.common.max_context_length, _BITS["float32"]


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
