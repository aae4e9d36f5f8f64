"""How much memory a conversion will need, estimated.

The model behind it, fitted to peaks measured on Linux at two sizes of the model (within a tenth):

- the interpreter and the libraries; coremltools loads torch where it is installed, which counts here;
- the tokenizer, once as it is read and once more while its file is made;
- ONNX: the rotary tables, made in float64, or the largest layer of the encoder, whichever is larger: weights
  are streamed;
- Core ML: the largest weight, which coremltools wants whole: four bytes for each number of a float in either
  precision, one for each integer or index;
- a recipe that needs data: torch and the reference in float32, whose answers are measured against, one
  picture's activations, and for the layers of one input the Hessian in float64, its factor and a copy.
"""

from collections.abc import Sequence
from typing import Final

from fastvlm_convert.manifest import Target
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.weights.config import ModelConfig
from fastvlm_convert.weights.plan import LayerPlan

_MB: Final = 1_000_000
_LIBRARIES: Final[dict[Target, int]] = {"onnx": 70 * _MB, "coreml": 340 * _MB}
_TORCH: Final = 350 * _MB
_TOKEN_READ, _TOKEN_WRITTEN = 630, 540  # bytes for each of the tokenizer's ids
_HESSIANS: Final = 3
_ACTIVATIONS: Final = 300 * _MB


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
    libraries = max(_LIBRARIES[target] for target in targets)
    writing = max(_working_bytes(config, plans, recipe, target) for target in targets)
    peak = libraries + num_tokens * _TOKEN_READ + max(writing, num_tokens * _TOKEN_WRITTEN)
    return peak + _calibration_bytes(plans) if recipe.is_calibrated else peak


def _working_bytes(config: ModelConfig, plans: Sequence[LayerPlan], recipe: Recipe, target: Target) -> int:
    if target == "coreml":
        return max(plan.size * (1 if plan.scheme else 4) for plan in plans)
    angles = 3 * 8 * recipe.common.max_context_length * config.decoder.head_dim // 2
    encoder = 3 * max(plan.size for plan in plans if not plan.layer.startswith("decoder."))
    return max(angles, encoder)


def _calibration_bytes(plans: Sequence[LayerPlan]) -> int:
    reference = 4 * sum(plan.size for plan in plans)
    widest = max((plan.columns for plan in plans if plan.scheme and plan.solver != "search"), default=0)
    return _TORCH + reference + _ACTIVATIONS + _HESSIANS * 8 * widest * widest
