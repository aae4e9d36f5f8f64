"""How much memory a conversion will need, estimated.

The model behind it, fitted to peaks measured on Linux at two sizes of the model (within a tenth):

- the interpreter and the target's libraries (`Backend.base_bytes`);
- the tokenizer as it is read, or while its file is made, before the stages;
- the compiler of the search, where integers of layers are to be found;
- what the target holds while it writes (`Backend.working_bytes`);
- a recipe that rounds activations: torch, the encoder twice, and one picture's activations;
- a recipe whose solvers need data: torch, and the greatest of four phases. While the reference answers, the
  encoder's weights in float32 and one picture's activations, or the decoder's and a cache of many rows.
  While tokens are weighed, the gradients of some samples through a block. While layers are solved, the
  states of all samples in the float and in the quantized model before and after a block, copies of a
  block's widest activation over the samples that pass together, and the float64 matrices of the widest
  layer, and what the allocator keeps from block to block. While answers are compared, the logits of some
  tokens.

Samples are taken to be as many and as long as those that calibrate by default, because nobody has read the
data yet.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from fastvlm_convert.amounts import size_text
from fastvlm_convert.arithmetic import ceil_div
from fastvlm_convert.available_memory import available_memory_bytes, memory_limit_bytes
from fastvlm_convert.errors import MemoryLimitError
from fastvlm_convert.exporters.backends import backend_of
from fastvlm_convert.peak_memory import resident_bytes
from fastvlm_convert.quantization.limits import (
    AVERAGED_SAMPLES,
    LOGIT_ROWS,
    MAX_ACTIVATION_BYTES,
    MAX_PIXELS,
    SAMPLES_BACK,
)
from fastvlm_convert.quantized.activations import STAGE
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.schemes import AffineScheme
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.targets import Target
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.parts import is_language
from fastvlm_convert.weights.source import CHUNK_BYTES

_MB: Final = 1_000_000
_WITH_TORCH: Final = 570 * _MB  # the interpreter, numpy, torch, and the pictures that calibrate
_TOKEN_READ: Final = 630  # bytes for each of the tokenizer's ids
COMPILER: Final = 125 * _MB  # LLVM, and the machine code that it made
ANSWERED_ROWS: Final = 32  # that of `model.batch`, which only torch can import
_PICTURE: Final = 4  # activations as large as the widest
_TEXT_TOKENS: Final = 90  # of a sample beside its picture: the prompt, and an answer of 64
MIXED_TEXTS: Final = 120  # those of `mix.texts`
_TEXT_LENGTH: Final = 100  # tokens of one of them, its answer included
_ANY_TEXT: Final = 2000  # ids of a tokenizer that can express the texts of the default mix
_GRADIENTS: Final = 8  # activations as large as the widest, while a gradient passes back through a block
_KEPT: Final = 120 * _MB  # freed by a block's solvers, not given back before the last block
_HESSIANS: Final = 4  # the sum, its damped copy, its factor and one more
_LOGIT: Final = 40  # bytes: of both models in float32, compared in float64
_ALONE: Final = 70 * _MB  # the interpreter and numpy

_PICTURES: Final = "calibrate with less: lower calibration.num_samples or common.image_size"
_TOKENS: Final = "calibrate with less: lower calibration.num_samples or calibration.max_tokens"
_COMPILED: Final = ("encoder", "layers")  # stages of a calibration in which the compiler is there already
_CALIBRATION: Final = {
    "answers": _PICTURES,
    "token weights": _TOKENS,
    "encoder": _PICTURES,
    "layers": _TOKENS,
}


@dataclass(frozen=True)
class StageNeed:
    """What a stage needs.

    Attributes:
        stage: Its name, as progress has it.
        peak_memory_bytes: Memory of the whole process, estimated.
    """

    stage: str
    peak_memory_bytes: int


def stage_needs(
    config: ModelConfig,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    targets: Sequence[Target],
    num_tokens: int,
    *,
    is_stored: bool = False,
) -> tuple[StageNeed, ...]:
    """What the stages need that need much, in their order.

    Args:
        config: Dimensions.
        plans: What happens to the layers.
        recipe: Its solvers and its context length.
        targets: Formats; none where a quantized checkpoint is made.
        num_tokens: Ids of the tokenizer.
        is_stored: Whether the checkpoint holds the integers that the layers have.
    """
    searched = not is_stored and any(isinstance(plan.scheme, AffineScheme) for plan in plans)
    compiler = COMPILER if searched else 0
    backends = [backend_of(target) for target in targets]
    tokenizer = num_tokens * _TOKEN_READ
    libraries = max((backend.base_bytes for backend in backends), default=_ALONE)
    needs = []
    if recipe.is_calibrated:
        base = max(libraries, _WITH_TORCH) + tokenizer
        if recipe.vision.activations != "float":
            needs.append(StageNeed(STAGE, base + _ranges_bytes(config, plans)))
        if recipe.is_solved:
            needs += [
                StageNeed(stage, base + size + (compiler if stage in _COMPILED else 0))
                for stage, size in _calibration(config, plans, recipe, num_tokens)
            ]
        libraries = max(libraries, _WITH_TORCH)
    libraries += compiler
    for target, backend in zip(targets, backends, strict=True):
        working = backend.working_bytes(config, recipe, plans)
        needs.append(StageNeed(target, libraries + tokenizer + working))
    if not targets:
        needs.append(StageNeed("weights", libraries + tokenizer + 4 * CHUNK_BYTES))
    else:
        needs.append(StageNeed("bundle", libraries + tokenizer))
    return tuple(needs)


def check_fits(needs: Sequence[StageNeed], allowed: int | None) -> None:
    """See that memory suffices, before any work begins.

    Args:
        needs: Of the stages.
        allowed: Bytes that may be used; None takes what is free, where the system tells that, else what the
            machine has.

    Raises:
        MemoryLimitError: Names the stage that needs most, and what would need less.
    """
    what = "is allowed"
    if allowed is None:
        what, free = "is free", available_memory_bytes()
        allowed = memory_limit_bytes() if free is None else free + (resident_bytes() or 0)
    worst = max(needs, key=lambda need: need.peak_memory_bytes)
    if worst.peak_memory_bytes <= allowed:
        return
    others = [n.peak_memory_bytes for n in needs if n.stage not in _CALIBRATION]
    if worst.stage == STAGE:
        hint = "lower common.image_size, or set vision.activations to float"
    elif worst.stage in _CALIBRATION:
        hint = f"{_CALIBRATION[worst.stage]}; --calibration none needs about {size_text(max(others))}"
    else:
        hint = "free some, choose a recipe that stores fewer bits, or export another target"
    raise MemoryLimitError(
        f"the stage '{worst.stage}' needs about {size_text(worst.peak_memory_bytes)} of memory, "
        f"{size_text(allowed)} {what}",
        where="--max-memory",
        hint=hint,
    )


@dataclass(frozen=True)
class _Pass:
    """How much of all samples is in memory while they go through blocks.

    Attributes:
        states: Of what stands between two blocks, so many of every sample.
        activations: Of a block's widest activation, so many of the samples that pass together.
    """

    states: int
    activations: int

    def bytes(self, count: int, state: int, widest: int) -> int:
        """For `count` samples with states and a widest activation of so many bytes."""
        together = max(widest, min(count * widest, MAX_ACTIVATION_BYTES))
        return self.states * count * state + self.activations * together


_SOLVED: Final = _Pass(7, 3)  # two models' states before, in and after a block; what both differ by
_ENCODER_SOLVED: Final = _Pass(2, 4)  # a picture's states behind a block take the place of those before it


def _calibration(
    config: ModelConfig, plans: Sequence[LayerPlan], recipe: Recipe, num_tokens: int
) -> Iterator[tuple[str, int]]:
    """The stages of a calibration, and what each needs beside the libraries.

    A floating-point number takes four bytes.
    """
    decoder, settings = config.decoder, recipe.calibration
    count, pixels = settings.num_samples, config.vision.image_size**2
    tokens = min(settings.max_tokens, config.vision.num_image_tokens + _TEXT_TOKENS)
    if num_tokens >= _ANY_TEXT:  # answers may be long
        tokens = settings.max_tokens
    texts = min(MIXED_TEXTS, count // 7 + count // 2 * 3)
    count += ceil_div(texts, max(1, tokens // _TEXT_LENGTH)) - count // 7
    state, widest = (4 * tokens * n for n in (decoder.hidden_size, decoder.intermediate_size))
    picture = _picture_bytes(config)
    language, vision = ([p for p in plans if is_language(p.layer) is part] for part in (True, False))
    held = [4 * sum(plan.size for plan in part) for part in (language, vision)]
    cache = (
        min(count, ANSWERED_ROWS) * tokens * 8 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim
    )
    encoding = held[1] + _PICTURE * picture
    yield "answers", max(encoding, held[0] + cache)
    logits = LOGIT_ROWS * decoder.vocab_size * _LOGIT
    if settings.token_weights != "uniform":
        asked = min(count, AVERAGED_SAMPLES) if settings.token_weights == "modality" else count
        together = min(asked, SAMPLES_BACK) * _GRADIENTS * widest
        yield "token weights", max(logits, 2 * asked * state + together)
    if any(plan.scheme for plan in vision):
        few = min(count, max(1, MAX_PIXELS // pixels))
        yield "encoder", max(encoding, _solving_encoder(config, vision, few))
    solving = _SOLVED.bytes(count, state, widest) + _hessian_bytes(language)
    yield "layers", _KEPT + max(logits, solving)


def _ranges_bytes(config: ModelConfig, plans: Sequence[LayerPlan]) -> int:
    """The encoder twice, as floats and as what stands for its integers, and one picture's activations."""
    weights = sum(plan.size for plan in plans if not is_language(plan.layer))
    return 2 * 4 * weights + _PICTURE * _picture_bytes(config)


def _hessian_bytes(plans: Sequence[LayerPlan]) -> int:
    """Of the widest layer whose solver needs data; 0 where there is none."""
    columns = max((plan.columns for plan in plans if plan.scheme and plan.solver != "search"), default=0)
    return _HESSIANS * 8 * columns * columns


def _solving_encoder(config: ModelConfig, plans: Sequence[LayerPlan], count: int) -> int:
    """Of the stage that needs most, where so many pictures solve its layers; 0 where nothing is solved."""
    if not _hessian_bytes(plans):
        return 0
    needs = []
    for number, stage in enumerate(config.vision.stages):
        positions = (config.vision.image_size >> 2 + number) ** 2
        own = [plan for plan in plans if plan.layer.startswith(f"vision.stages.{number}.")]
        passing = _ENCODER_SOLVED.bytes(count, 4 * stage.width * positions, 4 * stage.ffn_width * positions)
        needs.append(passing + _hessian_bytes(own))
    return max(needs)


def _picture_bytes(config: ModelConfig) -> int:
    """Of one picture's widest activation in the encoder."""
    vision = config.vision
    half, quarter = (vision.image_size // 2) ** 2, (vision.image_size // 4) ** 2
    ffn = max(stage.ffn_width * quarter >> 2 * s for s, stage in enumerate(vision.stages))
    return 4 * max(vision.stages[0].width * half, ffn)
