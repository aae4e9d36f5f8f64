"""Names, shapes and layouts that exporters, runtimes and checks share. A leaf: imports nothing.

Tensor names of the ONNX graphs are those that transformers.js and onnxruntime-genai read. Borders are
float32 in every precision, because clients mix files of different precisions; only the KV cache may
be float16.
"""

import re
from dataclasses import dataclass
from typing import Final, Literal

Component = Literal["vision", "embed", "decoder"]
COMPONENTS: Final[tuple[Component, ...]] = ("vision", "embed", "decoder")

FloatName = Literal["float32", "float16"]
# How the interpreter computes: in float32 on the stored weights, or rounding as the program declares.
Precision = Literal["exact", "device"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a graph's input or output; a symbolic dimension is a string."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


# Graph inputs and outputs.
PIXEL_VALUES: Final = (
    "pixel_values"  # float32 [batch_size, 3, S, S], RGB scaled to 0..1; or pictures of any size
)
PREPARED_PIXELS: Final = "prepared_pixels"  # within a graph that takes those: what its encoder gets
IMAGE_FEATURES: Final = "image_features"  # float32 [num_image_tokens, hidden]
INPUT_IDS: Final = "input_ids"  # int64 [batch_size, sequence_length]
INPUTS_EMBEDS: Final = "inputs_embeds"  # float32 [batch_size, sequence_length, hidden]
ATTENTION_MASK: Final = "attention_mask"  # int64 [batch_size, total_sequence_length]
LOGITS: Final = "logits"  # float32 [batch_size, 1, vocab], the last position only

# Inputs and states that only the Core ML programs have. There, floats have the decoder's compute dtype.
IMAGE: Final = "image"  # the vision encoder's input where it is an image
POSITION: Final = "position"  # int32 [1], tokens already in the cache
LAST_INDEX: Final = "last_index"  # int32 [1], row of a padded chunk that the logits come from
KEY_CACHE: Final = "k_cache"  # state, float16 [layers, num_kv_heads, context, head_dim]
VALUE_CACHE: Final = "v_cache"
KEY_CACHE_OUT: Final = "k_cache_out"  # where the cache is no state but goes in and out
VALUE_CACHE_OUT: Final = "v_cache_out"
DECODE: Final = "decode"  # functions of the decoder package
PREFILL: Final = "prefill"
EMBED: Final = "embed"
# Between the packages of a decoder that is stored in several: [1, tokens, hidden].
HIDDEN_STATES: Final = "hidden_states"
HIDDEN_STATES_OUT: Final = "hidden_states_out"
MAIN: Final = "main"  # the function of a component that has but one
MERGE: Final = "merge"  # the ONNX embedding that puts image features in the places of `<image>`

# Symbolic dimensions. transformers.js builds its empty cache from them: `batch_size` becomes 1, every
# other symbol 0.
BATCH: Final = "batch_size"
SEQUENCE: Final = "sequence_length"
PAST_SEQUENCE: Final = "past_sequence_length"
TOTAL_SEQUENCE: Final = "total_sequence_length"
NUM_IMAGE_TOKENS: Final = "num_image_tokens"
HEIGHT: Final = "height"  # of a picture as clients send it
WIDTH: Final = "width"

PATCH_SIZE: Final = 64  # pixels per image token along each edge
VISION_HEAD_DIM: Final = 32
VISION_NORM_EPS: Final = 1e-5  # LayerNorm and BatchNorm of FastViTHD

IMAGE_TOKEN: Final = "<image>"
SYSTEM_PROMPT: Final = "You are a helpful assistant."


def past_key(layer: int | str) -> str:
    """Cache input, [batch_size, num_kv_heads, past_sequence_length, head_dim]."""
    return f"past_key_values.{layer}.key"


def past_value(layer: int | str) -> str:
    """Cache input, [batch_size, num_kv_heads, past_sequence_length, head_dim]."""
    return f"past_key_values.{layer}.value"


def present_key(layer: int | str) -> str:
    """Cache output, [batch_size, num_kv_heads, total_sequence_length, head_dim]."""
    return f"present.{layer}.key"


def present_value(layer: int | str) -> str:
    """Cache output, [batch_size, num_kv_heads, total_sequence_length, head_dim]."""
    return f"present.{layer}.value"


def num_image_tokens(image_size: int) -> int:
    """Image tokens that one square image of `image_size` pixels becomes."""
    return (image_size // PATCH_SIZE) ** 2


ONNX_FILE_STEMS: Final[dict[Component, str]] = {
    "vision": "vision_encoder",
    "embed": "embed_tokens",
    "decoder": "decoder_model_merged",
}
# What transformers.js calls a precision (its `dtype`), and how a graph's file name ends for it.
PrecisionName = Literal["fp32", "fp16", "q8", "q4", "q4f16"]
ONNX_SUFFIXES: Final[dict[PrecisionName, str]] = {
    "fp32": "",
    "fp16": "_fp16",
    "q8": "_quantized",
    "q4": "_q4",
    "q4f16": "_q4f16",
}


def precision_name(storage: FloatName, compute: FloatName, bits: int | None) -> PrecisionName:
    """Name of a graph's precision.

    Args:
        storage: Dtype of its floats in the file.
        compute: Dtype of its arithmetic.
        bits: Of its integers, the fewest where there are several; None without any.
    """
    if bits == 4:
        return "q4f16" if compute == "float16" else "q4"
    if bits is not None:
        return "q8"
    return "fp32" if storage == "float32" else "fp16"


def onnx_file_name(component: Component, precision: PrecisionName) -> str:
    """File name of one graph as transformers.js looks it up for a precision."""
    return f"{ONNX_FILE_STEMS[component]}{ONNX_SUFFIXES[precision]}.onnx"


def onnx_merge_name(embed_file: str) -> str:
    """File name of the graph that looks up as another one does and merges image features."""
    return embed_file.replace(ONNX_FILE_STEMS["embed"], "embedding")


def onnx_data_name(graph_file: str) -> str:
    """File name of a graph's external data; clients derive it from the graph's own name."""
    return f"{graph_file}_data"


def numbered(name: str, package: int | None) -> str:
    """Name of a function or a package of a decoder in several packages; None is the last, which ends it."""
    return name if package is None else f"{name}_{package}"


APPLE_FOLDER: Final = "apple-app"  # of a bundle: what Apple's own app loads

# Check identifiers: what `verify` compares, in the order the data flows.
STAGES: Final = (
    "preprocessing",
    "image_features",
    "inputs_embeds",
    "prefill_logits",
    "decode_logits",
    "greedy_text",
)

# Operation names, the same in every target, so that reports can be compared op by op.


def decoder_op(layer: int, part: str) -> str:
    """Name of an operation in decoder layer `layer`, for example `l3_gate`."""
    return f"l{layer}_{part}"


def op_component(name: str) -> Component:
    """The component that an operation is part of."""
    return "decoder" if re.match(r"l\d+_|final_norm$|logits$", name) else "vision"


def vision_op(stage: int, block: int, part: str) -> str:
    """Name of an operation in block `block` of encoder stage `stage`, for example `s2b5_fc1`."""
    return f"s{stage}b{block}_{part}"


_VISION_OPS: Final = (  # of a layer's canonical name, the name of its operation
    (r"vision\.stem\.(\d+)", r"stem_\1"),
    (r"vision\.stages\.(\d+)\.downsample\.(\d+)", r"s\1_down_\2"),
    (r"vision\.stages\.(\d+)\.position", r"s\1_position"),
    (r"vision\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.conv", r"s\1b\2_ffn_conv"),
    (r"vision\.stages\.(\d+)\.blocks\.(\d+)\.(?:\w+\.)?(\w+)", r"s\1b\2_\3"),
    (r"vision\.final\.conv", "final"),
    (r"vision\.final\.se\.(\w+)", r"se_\1"),
    (r"projector\.(\w+)", r"projector_\1"),
)


def vision_layer_op(layer: str) -> str:
    """Name of the operation of an encoder's or projector's layer.

    Args:
        layer: Its canonical name, for example `vision.stages.2.blocks.5.ffn.fc1`.

    Raises:
        ValueError: It is no such layer.
    """
    for pattern, name in _VISION_OPS:
        if match := re.fullmatch(pattern, layer):
            return match.expand(name)
    raise ValueError(f"{layer} is no layer of an encoder or a projector")
