"""How much memory a conversion will need, estimated.

The model behind it, fitted to peaks measured on Linux at two sizes of the model (within a tenth):

- the interpreter and the target's libraries (`Backend.base_bytes`);
- the tokenizer, once as it is read and once more while its file is made;
- what the target holds while it writes (`Backend.working_bytes`);
- a recipe that needs data: torch, the pictures, and the greatest of three phases. While the reference
  answers, all weights in float32 and one picture's activations. While layers are solved, the states of all
  samples in the float and in the quantized model before and after a block (of the encoder in the quantized
  one alone, if its integers need no data), copies of a block's widest activation over the samples that pass
  together, and the float64 matrices of the widest layer. While the answers are compared, the logits of all
  their tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fastvlm_convert.exporters.backends import backend_of
from fastvlm_convert.quantization.limits import (
    LOGIT_ROWS,
    MAX_ACTIVATION_BYTES,
    MAX_PIXELS,
    PIXELS_TOGETHER,
)
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.targets import Target
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.parts import is_language

_MB: Final = 1_000_000
_WITH_TORCH: Final = 420 * _MB  # the interpreter, numpy and torch
_TOKEN_READ, _TOKEN_WRITTEN = 630, 540  # bytes for each of the tokenizer's ids
_PICTURE: Final = 4  # activations as large as the widest
_HESSIANS: Final = 5  # two sums, their damped copy, its factor and one more
_LOGIT: Final = 40  # bytes: of both models in float32, compared in float64
_ANSWER_TOKENS: Final = 12  # of an answer to the demo generator's questions, on average; at most 64


def predicted_peak(
    config: ModelConfig,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    targets: Sequence[Target],
    num_tokens: int,
) -> int:
    """Bytes that an export needs at its peak.

    Args:
        config: Dimensions.
        plans: What happens to the layers.
        recipe: Its solvers and its context length.
        targets: Formats.
        num_tokens: Ids of the tokenizer.
    """
    backends = [backend_of(target) for target in targets]
    libraries = max(backend.base_bytes for backend in backends)
    tokenizer = num_tokens * _TOKEN_READ
    writing = max(backend.working_bytes(config, recipe, plans) for backend in backends)
    peak = libraries + tokenizer + max(writing, num_tokens * _TOKEN_WRITTEN)
    if not recipe.is_calibrated:
        return peak
    return max(peak, max(libraries, _WITH_TORCH) + tokenizer + _calibration_bytes(config, plans, recipe))


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


_SOLVED: Final = _Pass(5, 4)  # two models' states before and after a block, and the parts that are joined


def _calibration_bytes(config: ModelConfig, plans: Sequence[LayerPlan], recipe: Recipe) -> int:
    """What solvers need beside the libraries; a floating-point number takes four bytes."""
    decoder, settings = config.decoder, recipe.calibration
    count = settings.num_samples
    state, widest = (4 * settings.max_tokens * n for n in (decoder.hidden_size, decoder.intermediate_size))
    picture, encoded = _picture_bytes(config)
    language, vision = ([p for p in plans if is_language(p.layer) is part] for part in (True, False))
    solving = _SOLVED.bytes(count, state, widest) + _hessian_bytes(language)
    size = config.vision.image_size**2
    if hessian := _hessian_bytes(vision):
        few = min(count, max(1, MAX_PIXELS // size))
        solving = max(solving, _SOLVED.bytes(few, encoded, picture) + hessian)
    if any(plan.scheme for plan in vision):
        together = min(count, max(1, PIXELS_TOGETHER // size))
        solving = max(solving, together * _PICTURE * picture)
    pixels = count * 3 * 4 * size
    answering = pixels + 4 * sum(plan.size for plan in plans) + _PICTURE * picture
    comparing = min(count * _ANSWER_TOKENS, LOGIT_ROWS) * decoder.vocab_size * _LOGIT
    return pixels + max(answering, solving, comparing)


def _hessian_bytes(plans: Sequence[LayerPlan]) -> int:
    """Of the widest layer whose solver needs data; 0 where there is none."""
    columns = max((plan.columns for plan in plans if plan.scheme and plan.solver != "search"), default=0)
    return _HESSIANS * 8 * columns * columns


def _picture_bytes(config: ModelConfig) -> tuple[int, int]:
    """Of one picture's activations in the encoder: the widest, and the widest between two blocks."""
    vision = config.vision
    half, quarter = (vision.image_size // 2) ** 2, (vision.image_size // 4) ** 2
    ffn = max(stage.ffn_width * quarter >> 2 * s for s, stage in enumerate(vision.stages))
    return 4 * max(vision.stages[0].width * half, ffn), 4 * vision.stages[0].width * quarter
