"""Recipes: how to convert. Frozen, typed settings and their strict YAML loader."""

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

from fastvlm_convert.dataclass_io import from_plain
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.io_names import PATCH_SIZE, FloatName
from fastvlm_convert.preprocess import ImageMode
from fastvlm_convert.yaml_file import read_yaml_file

FromCheckpoint = Literal["checkpoint"]

BLOCK_SIZES: Final = (16, 32, 64, 128)
MIN_IMAGE_SIZE: Final = 256
MAX_IMAGE_SIZE: Final = 1536
MIN_CONTEXT_LENGTH: Final = 64
MAX_CONTEXT_LENGTH: Final = 131072
MAX_SQNR_DB: Final = 200.0
MAX_GROUP_SIZE: Final = 1024
_LARGEST_GATES: Final = {"db": MAX_SQNR_DB, "nats": 100.0, "top1": 1.0}  # by the last word of a gate's name
MAX_SAMPLES: Final = 4096
MAX_PREFILL_CHUNK: Final = 1024
MAX_ANSWER_LENGTH: Final = 1024
MAX_RECIPE_BYTES: Final = 64 << 10  # the longest shipped one has 5 kB
MAX_RESIDUAL_SHIFT: Final = 8  # beyond it, float16 no longer holds the norms' epsilon well


@dataclass(frozen=True)
class CommonSettings:
    """What every target shares.

    Attributes:
        image_size: Edge of the square input in pixels, or `checkpoint` for the size it was trained at.
        image_mode: How images are made square: `pad`, `crop`, or `checkpoint` for what its config says.
        max_context_length: Tokens the KV cache can hold, image tokens included.
    """

    image_size: int | FromCheckpoint = "checkpoint"
    image_mode: ImageMode | FromCheckpoint = "checkpoint"
    max_context_length: int = 2048

    def __post_init__(self) -> None:
        size = self.image_size
        if size != "checkpoint" and (size % PATCH_SIZE or size < PATCH_SIZE):
            raise RecipeError(f"image_size is {size}, no multiple of {PATCH_SIZE}")
        if not MIN_CONTEXT_LENGTH <= self.max_context_length <= MAX_CONTEXT_LENGTH:
            raise RecipeError(
                f"max_context_length is {self.max_context_length}, "
                f"expected {MIN_CONTEXT_LENGTH} to {MAX_CONTEXT_LENGTH}"
            )


@dataclass(frozen=True)
class FloatSettings:
    """Precision of a component whose weights are stored as floats.

    Attributes:
        storage: Dtype of the weights in the file.
        compute: Dtype of its arithmetic. In ONNX the decoder's KV cache has it too, in Core ML it is float16.
        float32_ops: Operations that compute in float32 all the same, by name; `*` stands for any text.
    """

    storage: FloatName
    compute: FloatName
    float32_ops: tuple[str, ...] = ()

    def computes_in(self, op: str) -> FloatName:
        """Dtype in which the operation of a name computes."""
        return "float32" if any(fnmatchcase(op, p) for p in self.float32_ops) else self.compute

    def __post_init__(self) -> None:
        if self.compute == "float16" and self.storage == "float32":
            raise RecipeError("compute is 'float16', which needs storage 'float16' too")


@dataclass(frozen=True)
class TableSettings:
    """Precision of the embedding table; looking a row up is no arithmetic.

    Attributes:
        storage: Dtype of the rows in the file.
    """

    storage: FloatName


SchemeName = Literal["float", "int8", "int4", "palette8", "palette6", "palette4"]
Solver = Literal["search", "weighted", "gptq"]


@dataclass(frozen=True)
class QuantizeRule:
    """How some layers are quantized. The first rule whose pattern fits a layer decides.

    Attributes:
        layers: Patterns of layer names, `*` for any text: `decoder.layers.*`, `*.self_attn.v_proj`.
        scheme: `float` keeps them; `int8` and `int4` store integers with a scale; `palette8`, `palette6` and
            `palette4` store indices into tables (Core ML only).
        block_size: Integers: weights along the input axis that share a scale, or `channel` for a whole row.
        symmetric: Integers: no zero points; the range is centred.
        group_size: Palettes: output channels that share a table.
        channel_scale: Palettes: every output channel has a scale of its own besides.
        solver: `search` finds scales (or tables) without data; `weighted` the same with errors weighed by the
            calibration's inputs; `gptq` rounds so that later weights make up for earlier errors.
        on_indivisible: What to do with a layer whose width the block size does not divide, or whose output
            channels the group size does not.
    """

    layers: tuple[str, ...]
    scheme: SchemeName
    block_size: int | Literal["channel"] = "channel"
    symmetric: bool = True
    group_size: int = 16
    channel_scale: bool = False
    solver: Solver = "search"
    on_indivisible: Literal["error", "float"] = "error"

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
        if not 1 <= self.group_size <= MAX_GROUP_SIZE:
            raise RecipeError(f"group_size is {self.group_size}, expected 1 to {MAX_GROUP_SIZE}")
        if self.scheme == "float" and self.solver != "search":
            raise RecipeError(f"scheme float keeps a layer as it is; solver {self.solver} has no use for it")

    @property
    def is_palette(self) -> bool:
        """Whether the scheme stores indices into tables."""
        return self.scheme.startswith("palette")

    def fits(self, layer: str) -> bool:
        """Whether the rule is for a layer."""
        return any(fnmatchcase(layer, pattern) for pattern in self.layers)

    def __str__(self) -> str:
        """Its patterns."""
        return ", ".join(self.layers)


@dataclass(frozen=True)
class CalibrationSettings:
    """How data is used by the solvers that need it.

    Attributes:
        num_samples: Pictures with questions at most.
        max_tokens: Tokens of a sample at most, image tokens and answer included; longer ones are cut.
        token_weights: `uniform` weighs all tokens alike; `modality` weighs image and text tokens as the
            divergence of the answers feels their errors on average; `token` does that for each token.
        damping: Share of the mean diagonal added to a Hessian's.
        awq: Fold AWQ's channel scales into the norms before layers that are solved, where that is exact.
    """

    num_samples: int = 64
    max_tokens: int = 384
    token_weights: Literal["uniform", "modality", "token"] = "modality"
    damping: float = 0.01
    awq: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_samples <= MAX_SAMPLES:
            raise RecipeError(f"num_samples is {self.num_samples}, expected 1 to {MAX_SAMPLES}")
        if not 1 <= self.max_tokens <= MAX_CONTEXT_LENGTH:
            raise RecipeError(f"max_tokens is {self.max_tokens}, expected 1 to {MAX_CONTEXT_LENGTH}")
        if not 0 < self.damping <= 1:
            raise RecipeError(f"damping is {self.damping:g}, expected above 0 and at most 1")


@dataclass(frozen=True)
class RepairSettings:
    """Changes of the decoder that are exact in real arithmetic and keep float16 within its range.

    `fastvlm-convert scan CHECKPOINT --recipe NAME -o FILE` sets them where a model needs them.

    Attributes:
        residual_shift: The residual stream is divided by 2 to this power.
        rescaled_keys: Layers whose keys and queries exchange powers of two until they are equally large.
        float32_scores: Layers whose attention scores are computed and normalised in float32 (Core ML only).
        separate_key_bias: Layers whose cache holds the keys without their bias, which then enters the scores
            as the function of the position it is; these scores are float32 too (Core ML only).
    """

    residual_shift: int = 0
    rescaled_keys: tuple[int, ...] = ()
    float32_scores: tuple[int, ...] = ()
    separate_key_bias: tuple[int, ...] = ()

    def has_float32_scores(self, layer: int) -> bool:
        """Whether a layer's scores are float32, whatever the decoder computes in."""
        return layer in self.float32_scores or layer in self.separate_key_bias

    def __post_init__(self) -> None:
        if not 0 <= self.residual_shift <= MAX_RESIDUAL_SHIFT:
            raise RecipeError(f"residual_shift is {self.residual_shift}, expected 0 to {MAX_RESIDUAL_SHIFT}")


@dataclass(frozen=True)
class OnnxSettings:
    """What only the ONNX target has.

    Attributes:
        shared_table: Store a tied head and embedding once, in the decoder's data file. Native runtimes and
            Node open that; a browser cannot, because it finds data files by the graph's own name.
        accuracy_level: 4 rounds activations to int8 inside products with quantized weights, which is the only
            fast way for 8 bits and 1.8x faster for 4; 0 keeps them in float.
    """

    shared_table: bool = True
    accuracy_level: Literal[0, 4] = 4


@dataclass(frozen=True)
class CoreMLSettings:
    """What only the Core ML target has.

    Attributes:
        image_input: `image` takes a picture and scales it inside, `tensor` takes pixel_values in 0..1.
        sequence_lengths: `fixed` makes a prefill function of `prefill_chunk` tokens and a decode function of
            one; `range` and `enumerated` make one function for 1 to `prefill_chunk` tokens, or for either.
        prefill_chunk: Tokens a prefill call takes; the context length must be a multiple of it.
        kv_cache: `state` keeps the cache inside Core ML; `tensors` passes it in and out, for tests.
        drop_in: Whether to add the vision package that Apple's own app loads.
    """

    image_input: Literal["image", "tensor"] = "image"
    sequence_lengths: Literal["fixed", "range", "enumerated"] = "fixed"
    prefill_chunk: int = 64
    kv_cache: Literal["state", "tensors"] = "state"
    drop_in: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.prefill_chunk <= MAX_PREFILL_CHUNK:
            raise RecipeError(f"prefill_chunk is {self.prefill_chunk}, expected 1 to {MAX_PREFILL_CHUNK}")


@dataclass(frozen=True)
class Gates:
    """What `verify` demands.

    Attributes:
        min_sqnr_db: Least signal to noise of every numeric stage against the reference.
        identical_text: Whether the greedy answers must be the reference's, token by token.
        fp16_cache_min_sqnr_db: The same for the logits of a Core ML decoder whose arithmetic is float32 but
            whose cache, being state, is float16.
        device_min_sqnr_db: The same where Core ML itself runs, or the interpreter rounds as a device may.
        quantizer_max_kl_nats: With quantized layers, most mean divergence that the integers themselves cost
            the answers: the reference with these weights against the reference. The other gates then compare
            the bundle with the reference that holds its weights.
        quantizer_min_top1: Least share of the answers' tokens that the integers leave the likeliest.
        runtime_max_kl_nats: Most mean divergence that a runtime's own shortcuts cost, such as ONNX Runtime's
            int8 activations.
        max_new_tokens: Length of the answers that are compared.
    """

    min_sqnr_db: float
    identical_text: bool
    fp16_cache_min_sqnr_db: float = 60
    device_min_sqnr_db: float = 40
    quantizer_max_kl_nats: float = 0.05
    quantizer_min_top1: float = 0.95
    runtime_max_kl_nats: float = 0.05
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.max_new_tokens <= MAX_ANSWER_LENGTH:
            raise RecipeError(f"max_new_tokens is {self.max_new_tokens}, expected 1 to {MAX_ANSWER_LENGTH}")
        for gate, value in vars(self).items():
            most = _LARGEST_GATES.get(gate.rpartition("_")[2])
            if most is not None and not 0 <= value <= most:  # nor NaN, which no figure fails
                raise RecipeError(f"{gate} is {value:g}, expected 0 to {most:g}")


@dataclass(frozen=True)
class Recipe:
    """How to convert a checkpoint.

    Attributes:
        name: What it makes; also its file name.
        description: One line for people.
        vision: Encoder and projector.
        decoder: Decoder layers and head.
        embed: Embedding table.
        gates: What the result must pass.
        common: What every target shares.
        onnx: ONNX only.
        coreml: Core ML only.
        quantize: Which layers are stored as integers, and how; none if empty.
        calibration: How the solvers that need data use it.
        repairs: What keeps the decoder within float16's range.
        notes: What users should know before they ship it; `export` prints them.
    """

    name: str
    description: str
    vision: FloatSettings
    decoder: FloatSettings
    embed: TableSettings
    gates: Gates
    common: CommonSettings = CommonSettings()
    onnx: OnnxSettings = OnnxSettings()
    coreml: CoreMLSettings = CoreMLSettings()
    quantize: tuple[QuantizeRule, ...] = ()
    calibration: CalibrationSettings = CalibrationSettings()
    repairs: RepairSettings = RepairSettings()
    notes: tuple[str, ...] = ()

    @property
    def is_calibrated(self) -> bool:
        """Whether any rule needs data."""
        return any(rule.solver != "search" for rule in self.quantize)

    def __post_init__(self) -> None:
        if self.common.max_context_length % self.coreml.prefill_chunk:
            raise RecipeError(
                f"common.max_context_length {self.common.max_context_length} is no multiple of "
                f"coreml.prefill_chunk {self.coreml.prefill_chunk}"
            )
        if self.onnx.shared_table and self.embed.storage != self.decoder.storage:
            raise RecipeError(
                "onnx.shared_table needs one storage for head and embedding, got "
                f"{self.decoder.storage} (decoder) and {self.embed.storage} (embed)",
                hint="set onnx.shared_table to false, or the same storage for both",
            )

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain data."""
        return dataclasses.asdict(self)


def without_data(recipe: Recipe) -> Recipe:
    """The same recipe with every solver replaced by the search that needs no data."""
    return dataclasses.replace(
        recipe, quantize=tuple(dataclasses.replace(rule, solver="search") for rule in recipe.quantize)
    )


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the tool, by name."""
    packaged = Path(str(resources.files("fastvlm_convert"))) / "configs"
    checkout = Path(__file__).parent.parent / "configs"
    folder = packaged if packaged.is_dir() else checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str) -> Recipe:
    """Load a shipped recipe by name, or any recipe by the path of its YAML file.

    Raises:
        RecipeError: There is no such recipe, it is no YAML, or a setting is unknown, missing or impossible.
    """
    shipped = shipped_recipes()
    path = shipped.get(name_or_path, Path(name_or_path))
    if path.suffix not in (".yaml", ".yml"):
        raise RecipeError(
            f"unknown recipe '{name_or_path}'",
            hint=f"shipped recipes: {', '.join(shipped)}; or give the path of a .yaml file",
        )
    try:
        recipe = from_plain(Recipe, read_yaml_file(path, MAX_RECIPE_BYTES))
        _check_image_size(recipe.common.image_size)
    except FileNotFoundError as error:
        hint = f"the tool ships one: --recipe {path.stem}" if path.stem in shipped else None
        raise RecipeError("there is no such recipe", where=path, hint=hint) from error
    except OSError as error:
        raise RecipeError(f"cannot read: {error.strerror}", where=path) from error
    except RecipeError as error:
        raise RecipeError(error.args[0], where=path, hint=error.given_hint) from error
    except ValueError as error:
        raise RecipeError(str(error), where=path) from error
    return recipe


def _check_image_size(size: int | FromCheckpoint) -> None:
    """A checkpoint may have been trained at any size; those that can be chosen are fewer."""
    if size != "checkpoint" and not MIN_IMAGE_SIZE <= size <= MAX_IMAGE_SIZE:
        raise RecipeError(
            f"common.image_size is {size}, expected a multiple of {PATCH_SIZE} "
            f"from {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}, or 'checkpoint'"
        )
