"""The sections of a recipe: frozen, typed settings with their ranges. `recipe.py` puts them together."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final, Literal

from fastvlm_convert.dataclass_io import about, check_ranges, setting
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.io_names import PATCH_SIZE, FloatName
from fastvlm_convert.preprocess import ImageMode

FromCheckpoint = Literal["checkpoint"]

BLOCK_SIZES: Final = (16, 32, 64, 128)
MIN_IMAGE_SIZE: Final = 256
MAX_IMAGE_SIZE: Final = 1536
MAX_CONTEXT_LENGTH: Final = 131072
MIN_WIDTH: Final = 64  # of the parts of wide matrices
MAX_GROUP_SIZE: Final = 1024
MAX_RESIDUAL_SHIFT: Final = 8  # beyond it, float16 no longer holds the norms' epsilon well


@dataclass(frozen=True)
class CommonSettings:
    """What every target shares."""

    image_size: int | FromCheckpoint = setting(
        "checkpoint",
        "Edge of the square input in pixels, or `checkpoint` for the size that the model was trained at.",
        minimum=MIN_IMAGE_SIZE,
        maximum=MAX_IMAGE_SIZE,
        multiple_of=PATCH_SIZE,
    )
    image_mode: ImageMode | FromCheckpoint = setting(
        "checkpoint",
        "How images are made square: `pad`, `crop`, or `checkpoint` for what its config says.",
    )
    max_context_length: int = setting(
        2048,
        "Tokens the KV cache can hold, image tokens included.",
        minimum=64,
        maximum=MAX_CONTEXT_LENGTH,
    )
    system_prompt: str = setting(
        "checkpoint",
        "The system message of conversations that bring none, or `checkpoint` for the one that the model was "
        "trained with.",
    )

    def __post_init__(self) -> None:
        size = self.image_size
        if size != "checkpoint" and (size % PATCH_SIZE or size < PATCH_SIZE):
            raise RecipeError(f"image_size is {size}, no multiple of {PATCH_SIZE}")
        check_ranges(self, "max_context_length")


_FLOAT32_OPS: Final = "Names of operations that compute in float32 regardless; `*` matches any text."
_WIDER: Final = "set storage to float16, or compute to float32"


@dataclass(frozen=True)
class FloatSettings:
    """Precision of a component whose weights are stored as floats."""

    storage: FloatName = field(metadata=about("Dtype of the weights in the file."))
    compute: FloatName = field(metadata=about("Dtype of the arithmetic."))
    float32_ops: tuple[str, ...] = setting((), _FLOAT32_OPS)

    def computes_in(self, op: str) -> FloatName:
        """Dtype in which the operation with this name computes."""
        return "float32" if any(fnmatchcase(op, p) for p in self.float32_ops) else self.compute

    def __post_init__(self) -> None:
        if self.compute == "float16" and self.storage == "float32":
            raise RecipeError("compute is 'float16', which needs storage 'float16' too", hint=_WIDER)


@dataclass(frozen=True)
class VisionSettings(FloatSettings):
    """Precision of encoder and projector."""

    activations: Literal["float", "int8", "int16"] = setting(
        "float",
        "What layers with int8 weights per channel multiply: `int8` (ONNX and Core ML) and `int16` (ONNX "
        "only) round activations by ranges taken from calibration pictures. int8 is fast on processors in "
        "ONNX; int16 is for accelerators that have such kernels, and slow elsewhere.",
    )


@dataclass(frozen=True)
class DecoderSettings:
    """Precision of the decoder, which may be left to each target."""

    storage: FloatName = field(metadata=about("Dtype of the weights in the file."))
    compute: FloatName | Literal["auto"] = field(
        metadata=about(
            "Dtype of arithmetic, in ONNX also of the KV cache; auto: float32 in ONNX, else float16."
        )
    )
    float32_ops: tuple[str, ...] = setting((), _FLOAT32_OPS)

    def on(self, own: FloatName) -> FloatSettings:
        """The settings of a target, with its own dtype where they say `auto`."""
        return FloatSettings(self.storage, own if self.compute == "auto" else self.compute, self.float32_ops)

    def __post_init__(self) -> None:
        if self.compute != "float32" and self.storage == "float32":
            raise RecipeError(f"compute is '{self.compute}', which needs storage 'float16' too", hint=_WIDER)


@dataclass(frozen=True)
class TableSettings:
    """Precision of the embedding table, which is only looked up in."""

    storage: FloatName = field(metadata=about("Dtype of the rows in the file."))


SchemeName = Literal["float", "int8", "int4", "palette8", "palette6", "palette4"]
Solver = Literal["search", "weighted", "gptq"]


@dataclass(frozen=True)
class QuantizeRule:
    """How some layers are quantized. The first rule with a pattern that matches a layer applies."""

    layers: tuple[str, ...] = field(
        metadata=about("Layer names; `*` matches any text: `decoder.layers.*`, `*.self_attn.v_proj`.")
    )
    scheme: SchemeName = field(
        metadata=about(
            "`float` leaves them alone; `int8` and `int4` store integers with a scale; `palette8`, "
            "`palette6` and `palette4` store indices into tables (Core ML only)."
        )
    )
    block_size: int | Literal["channel"] = setting(
        "channel",
        "Integers: number of weights along the input axis that share a scale, or `channel` for a whole row.",
        choices=BLOCK_SIZES,
    )
    symmetric: bool = setting(True, "Integers: no zero points; the range is centered on zero.")
    group_size: int = setting(
        16, "Palettes: number of output channels that share a table.", minimum=1, maximum=MAX_GROUP_SIZE
    )
    channel_scale: bool = setting(False, "Palettes: every output channel also has a scale of its own.")
    solver: Solver = setting(
        "search",
        "`search` finds scales (or tables) without data; `weighted` does so with errors weighted by the "
        "calibration's inputs; `gptq` rounds so that later weights make up for earlier errors.",
    )
    on_indivisible: Literal["smaller", "float", "error"] = setting(
        "smaller",
        "What to do with a layer whose width is not a multiple of the block size, or whose number of output "
        "channels is not a multiple of the group size: `smaller` takes the largest of 64, 32, 16 and "
        "`channel`, or the largest group, that fits (in the decoder `float` in place of `channel`); `float` "
        "leaves it in float; `error` stops.",
    )

    def __post_init__(self) -> None:
        if self.block_size != "channel" and self.block_size not in BLOCK_SIZES:
            raise RecipeError(
                f"block_size is {self.block_size}, expected 'channel' or one of "
                f"{', '.join(str(size) for size in BLOCK_SIZES)}"
            )
        if self.is_palette and (self.block_size != "channel" or not self.symmetric):
            raise RecipeError(f"scheme {self.scheme} has neither block_size nor zero points")
        if not self.is_palette and (self.channel_scale or self.group_size != 16):
            raise RecipeError(f"group_size and channel_scale belong to palettes, not to scheme {self.scheme}")
        check_ranges(self, "group_size")
        if self.scheme == "float" and self.solver != "search":
            raise RecipeError(f"scheme float keeps a layer as it is; solver {self.solver} has no use for it")

    @property
    def is_palette(self) -> bool:
        """Whether the scheme stores indices into tables."""
        return self.scheme.startswith("palette")

    def fits(self, layer: str) -> bool:
        """Whether the rule matches a layer."""
        return any(fnmatchcase(layer, pattern) for pattern in self.layers)

    def __str__(self) -> str:
        """Its patterns."""
        return ", ".join(self.layers)


@dataclass(frozen=True)
class CalibrationSettings:
    """How data is used by the solvers that need it."""

    num_samples: int = setting(64, "Maximum number of images with questions.", minimum=1, maximum=4096)
    max_tokens: int = setting(
        384,
        "Maximum length of a sample in tokens, image tokens and answer included; longer answers are cut.",
        minimum=1,
        maximum=MAX_CONTEXT_LENGTH,
    )
    token_weights: Literal["uniform", "modality", "token"] = setting(
        "modality",
        "`uniform` gives all tokens equal weight; `modality` weights image tokens and text tokens by how "
        "sensitive the answers are to errors there on average; `token` does that for each single token.",
    )
    damping: float = setting(
        0.01,
        "Added to a Hessian's diagonal, as a share of its mean.",
        exclusive_minimum=0,
        maximum=1,
    )
    awq: bool = setting(
        False, "Fold AWQ's channel scales into the norms before solved layers, where that is exact."
    )

    def __post_init__(self) -> None:
        check_ranges(self, "num_samples", "max_tokens", "damping")


@dataclass(frozen=True)
class RepairSettings:
    """Changes of the decoder that are exact in real arithmetic and keep it within the range of float16.

    `fastvlm-convert scan CHECKPOINT --recipe NAME -o FILE` sets them where a model needs them.
    """

    residual_shift: int = setting(
        0, "The residual stream is divided by 2 to this power.", minimum=0, maximum=MAX_RESIDUAL_SHIFT
    )
    rescaled_keys: tuple[int, ...] = setting(
        (), "Layers that shift powers of two between keys and queries until both are equally large."
    )
    float32_scores: tuple[int, ...] = setting(
        (), "Layers whose attention scores are computed and normalized in float32 (Core ML only)."
    )
    separate_key_bias: tuple[int, ...] = setting(
        (),
        "Layers that cache keys without their bias; the bias enters the scores separately, as a function of "
        "the position. These scores are float32 too (Core ML only).",
    )

    def has_float32_scores(self, layer: int) -> bool:
        """Whether a layer's scores are float32, whatever the decoder computes in."""
        return layer in self.float32_scores or layer in self.separate_key_bias

    def __post_init__(self) -> None:
        check_ranges(self, "residual_shift")


@dataclass(frozen=True)
class OnnxSettings:
    """What only the ONNX target has."""

    shared_table: bool = setting(
        True,
        "Store a tied head and embedding once, in the decoder's data file. Native runtimes and Node can open "
        "it; a browser cannot, because it finds data files only by the name of the graph.",
    )
    accuracy_level: Literal[0, 4] = setting(
        4,
        "4 rounds activations to int8 in products with quantized weights, which is the only fast way for 8 "
        "bits and 1.8 times as fast for 4; 0 keeps them in float.",
    )
    vision_weights: Literal["folded", "resident"] = setting(
        "folded",
        "When the vision graph's integers become floats: `folded` when the runtime loads the graph, so that "
        "the encoder is as fast as a float one; `resident` for every picture, so that its weights take no "
        "more memory than their file between pictures, as in browsers.",
    )
    preprocessing: Literal["in_graph", "client"] = setting(
        "client",
        "Who makes pictures square and resizes them: `in_graph` has the vision graph do it, with pictures of "
        "any size and exactly as the original does; `client` leaves it to the app, which gives S x S pixels.",
    )


@dataclass(frozen=True)
class CoreMLSettings:
    """What only the Core ML target has."""

    image_input: Literal["image", "tensor"] = setting(
        "image",
        "`image` takes a picture and scales it itself; `tensor` takes pixel_values in 0..1.",
    )
    sequence_lengths: Literal["fixed", "range", "enumerated"] = setting(
        "fixed",
        "`fixed` makes a prefill function for `prefill_chunk` tokens and a decode function for one token; "
        "`range` makes one function for 1 to `prefill_chunk` tokens, `enumerated` one for either number.",
    )
    prefill_chunk: int = setting(
        64,
        "Tokens per prefill call; the context length must be a multiple of it.",
        minimum=1,
        maximum=1024,
    )
    kv_cache: Literal["state", "tensors"] = setting(
        "state", "`state` has Core ML hold the cache; `tensors` passes it in and out, for tests."
    )
    attention: Literal["fused", "decomposed"] = setting(
        "fused",
        "`fused` is one operation, which iOS 26 is reported to compute wrongly; `decomposed` is two products "
        "and a softmax.",
    )
    split_wider_than: int | Literal["never"] = setting(
        "never",
        "Linear layers with more inputs or outputs, and tables and heads with more rows, are stored and "
        "computed in equal parts of at most this size; `never` leaves them whole.",
        minimum=MIN_WIDTH,
    )
    split_larger_than_mb: int | Literal["never"] = setting(
        "never",
        "A decoder with more megabytes of weights is stored in packages of at most this many, which run "
        "one after the other; `never` leaves it whole.",
        minimum=1,
    )
    drop_in: bool = setting(False, "Whether to add the vision package that Apple's own app loads.")

    def __post_init__(self) -> None:
        check_ranges(self, "prefill_chunk")
        if self.split_wider_than != "never" and self.split_wider_than < MIN_WIDTH:
            raise RecipeError(
                f"split_wider_than is {self.split_wider_than}, expected at least {MIN_WIDTH}, or 'never'"
            )
        if self.split_larger_than_mb != "never" and self.split_larger_than_mb < 1:
            raise RecipeError(
                f"split_larger_than_mb is {self.split_larger_than_mb}, expected at least 1, or 'never'"
            )
