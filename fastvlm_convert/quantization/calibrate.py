"""Find the integers of layers that need data: ask the reference, weigh the tokens, solve in turn."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastvlm_convert import __version__
from fastvlm_convert.errors import RecipeError
from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.progress import OnStage
from fastvlm_convert.quantization.answers import Answered, TokenBatch, answered, token_batch
from fastvlm_convert.quantization.calibration import Calibration
from fastvlm_convert.quantization.layerwise import Task, kept_layer, solve
from fastvlm_convert.quantization.score import AnswerScore, answer_score, keep_score, kept_score
from fastvlm_convert.quantization.token_weights import FloatPass, averaged, float_pass
from fastvlm_convert.quantization.weight_plan import WeightPlan
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.weight import AnyWeight, MixedSource, dense_view
from fastvlm_convert.user_cache import cache_folder
from fastvlm_convert.weights.source import WeightSource

ROWS = 256  # of logits at a time

_SCORE = "answers.json"


@dataclass(frozen=True)
class SolvedLayers:
    """Weights by canonical name, and what they do to the answers."""

    weights: dict[str, AnyWeight]
    score: AnswerScore


def solved_layers(
    plan: WeightPlan,
    floats: WeightSource,
    searched: MixedSource,
    calibration: Calibration,
    on_progress: OnStage,
) -> SolvedLayers:
    """Solve the layers whose rules need data; finished ones are kept in the user's cache.

    Args:
        plan: What happens to the weights of a float checkpoint.
        floats: Those weights, folded and repaired.
        searched: The same with those layers quantized that need no data.
        calibration: Pictures with questions.
        on_progress: Called with the name of the stage and the share of it that is done, 0..1.

    Raises:
        RecipeError: The data is not at hand, or a prompt is too long.
    """
    todo = {p.layer: p for p in plan.layers if p.scheme is not None and p.solver != "search"}
    folder = cache_folder() / "solved" / _key(plan, calibration)
    kept, score = _kept_layers(folder, todo), kept_score(folder / _SCORE)
    if kept is None or score is None:
        if not calibration.questions:
            raise RecipeError(
                "the layers were calibrated with data that is not at hand",
                hint="give the quantized checkpoint as the reference, or calibrate with the same data again",
            )
        folder.mkdir(parents=True, exist_ok=True)
        data = answered(plan, calibration, partial(on_progress, "answers"))
        models = BlockStreamer(plan.config, floats), BlockStreamer(plan.config, dense_view(searched))
        kept, score = _solve(plan, todo, models, data, folder, on_progress)
        keep_score(folder / _SCORE, score)
    return SolvedLayers(kept, score)


def _kept_layers(folder: Path, plans: Mapping[str, LayerPlan]) -> dict[str, AnyWeight] | None:
    """What an earlier run found, or None where a layer is missing or damaged."""
    weights: dict[str, AnyWeight] = {}
    for layer, plan in plans.items():
        kept = kept_layer(folder, plan)
        if kept is None:
            return None
        weight, floats = kept
        weights |= {f"{layer}.weight": weight, **floats}
    return weights


def _key(plan: WeightPlan, calibration: Calibration) -> str:
    recipe = plan.recipe
    rules = [asdict(rule) for rule in recipe.quantize]
    settings = asdict(recipe.calibration)
    repairs = asdict(recipe.repairs)
    asked = (plan.checkpoint.sha256, calibration.sha256, plan.images, plan.prompt)
    parts = (__version__, *asked, rules, settings, repairs)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _solve(
    plan: WeightPlan,
    todo: dict[str, LayerPlan],
    models: tuple[BlockStreamer, BlockStreamer],
    data: Answered,
    folder: Path,
    on_progress: OnStage,
) -> tuple[dict[str, AnyWeight], AnswerScore]:
    """Solve layers of the second of two models, which holds the weights that need no data already."""
    reference, chain = models
    batch = token_batch(data.samples, torch.from_numpy(data.features), reference.embed)
    kind = plan.recipe.calibration.token_weights
    passed = float_pass(reference, batch, kind != "uniform", partial(on_progress, "token weights"))
    weights = _weights(passed, batch, kind)
    task = Task(reference, chain, todo, plan.recipe.calibration, data, weights, folder)
    solved = solve(task, partial(on_progress, "layers"))
    hidden = (torch.split(part, ROWS) for part in (passed.hidden, solved.hidden))
    logits = ((reference.logits(x).numpy(), chain.logits(y).numpy()) for x, y in zip(*hidden, strict=True))
    return solved.weights, answer_score(logits)


def _weights(passed: FloatPass, batch: TokenBatch, kind: str) -> dict[str, Tensor]:
    if kind == "modality":
        return {name: averaged(weights, batch) for name, weights in passed.weights.items()}
    return dict(passed.weights)
