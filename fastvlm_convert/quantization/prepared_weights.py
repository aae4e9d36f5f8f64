"""The weights that a recipe makes of a checkpoint: what exporters write and the reference can hold."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastvlm_convert.activation_report import ActivationReport
from fastvlm_convert.errors import MissingDependencyError, RecipeError
from fastvlm_convert.progress import OnStage, ignore_stage
from fastvlm_convert.quantization.awq import behind_scales
from fastvlm_convert.quantization.calibration import Calibration, read_calibration
from fastvlm_convert.quantization.coverage import Coverage
from fastvlm_convert.quantization.data_free import quantize_weights
from fastvlm_convert.quantization.score import AnswerScore
from fastvlm_convert.quantization.weight_plan import WeightPlan
from fastvlm_convert.quantized.activations import STAGE
from fastvlm_convert.quantized.weight import MixedSource
from fastvlm_convert.weights.equalize import equalized
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.rescale import fp16_safe
from fastvlm_convert.weights.source import WeightSource


@dataclass(frozen=True)
class PreparedWeights:
    """A checkpoint's weights as a recipe wants them.

    Attributes:
        weights: Canonical names, folded; integers where planned.
        floats: What they stand for: folded, repaired, behind AWQ's scales. Empty for a quantized checkpoint.
        score: What the integers do to the answers; None where no solver ran the model.
        activations: What was done to the encoder's activations; None where they are floats.
    """

    weights: MixedSource
    floats: WeightSource
    score: AnswerScore | None
    activations: ActivationReport | None = None


def calibration_for(plan: WeightPlan, source: Path | None) -> Calibration | None:
    """The data that a plan calibrates with, or None where it needs none.

    Args:
        plan: The plan; a quantized checkpoint needs no data any more.
        source: A folder or a .jsonl file; None takes the mix that calibrates by default.

    Raises:
        ImageError: The source is missing, empty or damaged.
        RecipeError: There is a source, but nothing to calibrate.
    """
    if plan.is_calibrated:
        return read_calibration(source, plan.recipe.calibration, plan.checkpoint.tokenizer)
    if source is not None:
        why = f"no solver of recipe '{plan.recipe.name}' needs data"
        if plan.checkpoint.quantized is not None:
            why = "the checkpoint is quantized already"
        raise RecipeError(f"there is nothing to calibrate: {why}", hint="leave --calibration out")
    return None


def remembered_calibration(plan: WeightPlan, sha256: str | None) -> Calibration | None:
    """The data of a hash: the default mix if it is its, else the hash alone, enough for the cache."""
    if sha256 is None:
        return None
    default = read_calibration(None, plan.recipe.calibration, plan.checkpoint.tokenizer)
    return default if default.sha256 == sha256 else Calibration((), sha256)


def float_weights(plan: WeightPlan) -> WeightSource:
    """The weights that are quantized: folded, and repaired where the recipe says so."""
    checkpoint = plan.checkpoint
    return fp16_safe(fold(checkpoint.weights), checkpoint.config.decoder, plan.recipe.repairs)


def prepare_weights(
    plan: WeightPlan, calibration: Calibration | None = None, on_progress: OnStage = ignore_stage
) -> PreparedWeights:
    """Fold, repair and quantize. A quantized checkpoint has all that done.

    Args:
        plan: What happens to the weights.
        calibration: Data for the solvers that need it; None where none does.
        on_progress: Called with the name of the stage and the share of it that is done, 0..1.

    Raises:
        RecipeError: Solvers or activations need data, and there is none.
        MissingDependencyError: They need data, and torch is not installed.
    """
    if plan.checkpoint.quantized is not None:
        return PreparedWeights(plan.checkpoint.quantized.weights, {}, None)
    floats = float_weights(plan)
    if not plan.is_calibrated:
        return PreparedWeights(quantize_weights(floats, plan.layers), floats, None)
    if calibration is None:
        raise RecipeError(f"recipe '{plan.recipe.name}' needs data to calibrate with, and none is recorded")
    try:
        from fastvlm_convert.quantization.calibrate import solved_layers
        from fastvlm_convert.quantization.static_stage import static_stage
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "calibration") from error

    static = None
    if plan.recipe.vision.activations != "float":
        static = static_stage(plan, floats, calibration, partial(on_progress, STAGE))
        floats = equalized(floats, static.exponents)
    searched: MixedSource = quantize_weights(floats, plan.layers)
    if static is not None:
        searched = static.applied(searched)
    report = None if static is None else static.report
    if not plan.recipe.is_solved:
        return PreparedWeights(searched, floats, None, report)
    solved = solved_layers(plan, floats, searched, calibration, on_progress)
    weights = {**searched, **solved.weights}
    return PreparedWeights(weights, behind_scales(floats, weights), solved.score, report)


def calibrated_coverage(plan: WeightPlan, sha256: str | None) -> Coverage | None:
    """Which pictures the layers were solved on.

    Args:
        plan: What happens to the weights.
        sha256: Hash of the data that layers were solved with, if any.

    Returns:
        None where no layer was solved with data.
    """
    if sha256 is None or plan.checkpoint.quantized is not None or not plan.recipe.is_solved:
        return None
    from fastvlm_convert.quantization.calibrate import saved_coverage

    return saved_coverage(plan, Calibration((), sha256))  # what was kept is found by the hash
