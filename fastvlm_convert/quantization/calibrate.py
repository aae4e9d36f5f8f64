"""Find the integers of layers that need data: ask the reference, weigh the tokens, solve in turn."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch

from fastvlm_convert.errors import RecipeError
from fastvlm_convert.heap import return_freed_memory
from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.progress import OnShare, OnStage
from fastvlm_convert.quantization.answers import CalibrationSet, collect_samples, token_batch
from fastvlm_convert.quantization.block_solver import SolverTask, load_solved
from fastvlm_convert.quantization.calibration import Calibration
from fastvlm_convert.quantization.coverage import Coverage, coverage_of, load_coverage, save_coverage
from fastvlm_convert.quantization.layerwise import solve_layerwise
from fastvlm_convert.quantization.limits import LOGIT_ROWS, has_fine_encoder
from fastvlm_convert.quantization.score import AnswerScore, answer_score, load_score, save_score
from fastvlm_convert.quantization.stages import ACTIVATIONS, SOLVED
from fastvlm_convert.quantization.token_weights import measured_weights
from fastvlm_convert.quantization.weight_plan import WeightPlan
from fastvlm_convert.quantized.layer_plan import LayerPlan
from fastvlm_convert.quantized.weight import AnyWeight, MixedSource, dense_view
from fastvlm_convert.recipe_settings import CalibrationSettings
from fastvlm_convert.user_cache import About, current_tally, hold, save_about, touch
from fastvlm_convert.weights.source import WeightSource

_SCORE: Final = "answers.json"
_COVERAGE: Final = "coverage.npz"


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
    """Solve the layers whose rules need data; solved ones are saved in the user's cache.

    Args:
        plan: What happens to the weights of a float checkpoint.
        floats: Those weights, folded and repaired.
        searched: The same, with the layers quantized that need no data.
        calibration: Images with questions.
        on_progress: Called with the name of the stage and the share of it that is done, 0..1.

    Raises:
        RecipeError: The data is not at hand, or a prompt is too long.
    """
    todo = {p.layer: p for p in plan.layers if p.scheme is not None and p.solver != "search"}
    folder = SOLVED.path(_key(plan, calibration))
    known = _load_solved_layers(folder, todo) if hold(folder) else None
    if known is not None:
        touch(folder)
        for layer in todo:
            current_tally().note(SOLVED, layer, True)
        return known
    if not calibration.questions:
        raise RecipeError(
            "the layers were calibrated with data that is not at hand",
            hint="give the quantized checkpoint as the reference, or calibrate with the same data again",
        )
    _make(folder, plan)
    data = collect_samples(plan, calibration, partial(on_progress, "answers"))
    return_freed_memory()
    reference, settings = BlockStreamer(plan.config, floats), plan.recipe.calibration
    task = SolverTask(
        reference,
        BlockStreamer(plan.config, dense_view(searched)),
        todo,
        settings,
        data,
        _token_weights(reference, settings, data, partial(on_progress, "token weights")),
        folder,
        has_fine_encoder(plan.layers),
    )
    return_freed_memory()
    solved = _solve(task, on_progress)
    return_freed_memory()
    save_coverage(folder / _COVERAGE, coverage_of(data.features[: data.num_fitted_pictures]))
    save_score(folder / _SCORE, solved.score)
    return solved


def saved_coverage(plan: WeightPlan, calibration: Calibration) -> Coverage | None:
    """Which pictures the layers of a plan were solved on; None where they are not at hand."""
    return load_coverage(SOLVED.path(_key(plan, calibration)) / _COVERAGE)


def _make(folder: Path, plan: WeightPlan) -> None:
    """The folder for solved layers, which says what they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    while not hold(folder):  # somebody clears the cache at this very moment
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint = plan.checkpoint
    save_about(folder, SOLVED, About(checkpoint.path.resolve().name, checkpoint.sha256, plan.recipe.name))


def _key(plan: WeightPlan, calibration: Calibration) -> str:
    """Name of the cache folder: a hash of all that the integers depend on.

    Of a recipe that is what becomes of every layer, not the rules that say so; of the repairs those that
    change weights; and of the calibration settings all but the number of samples, for which the data's hash
    stands.
    """
    layers = [(p.layer, p.shape, p.scheme, p.solver if p.scheme else None) for p in plan.layers]
    settings = asdict(plan.recipe.calibration)
    del settings["num_samples"]
    repairs = plan.recipe.repairs
    changed = (repairs.residual_shift, repairs.rescaled_keys)
    asked: tuple[object, ...] = (plan.checkpoint.sha256, calibration.sha256, plan.images, plan.prompt)
    if plan.recipe.vision.activations != "float":
        asked = (*asked, plan.recipe.vision.activations, ACTIVATIONS.version)
    return hashlib.sha256(repr((*asked, layers, settings, changed)).encode()).hexdigest()


def _load_solved_layers(folder: Path, plans: Mapping[str, LayerPlan]) -> SolvedLayers | None:
    """What an earlier run saved; None where a layer or the score is missing or damaged."""
    weights: dict[str, AnyWeight] = {}
    for plan in plans.values():
        layer = load_solved(folder, plan)
        if layer is None:
            return None
        weights |= layer
    score = load_score(folder / _SCORE)
    if score is None or load_coverage(folder / _COVERAGE) is None:
        return None
    return SolvedLayers(weights, score)


def _token_weights(
    reference: BlockStreamer, settings: CalibrationSettings, data: CalibrationSet, on_progress: OnShare
) -> dict[str, torch.Tensor]:
    """The weights of the tokens that layers are solved with, see `measured_weights`."""
    batch = token_batch(data.samples, torch.from_numpy(data.features), reference.embed)
    return measured_weights(reference, batch.first(data.num_fitted), settings, on_progress)


def _solve(task: SolverTask, on_progress: OnStage) -> SolvedLayers:
    """Solve the layers and compare the answers."""
    data, reference, quantized = task.data, task.reference, task.quantized
    solved = solve_layerwise(task, on_progress)
    is_held_out = len(data.samples) > data.num_fitted
    owner = np.repeat(np.arange(len(data.samples)), [len(sample.answer) for sample in data.samples])
    judged = owner >= data.num_fitted if is_held_out else np.ones(len(owner), bool)
    owner = owner[judged]
    has_picture = np.asarray([sample.num_pictures > 0 for sample in data.samples])[owner]
    kept = (hidden[torch.from_numpy(judged)] for hidden in (solved.reference, solved.hidden))
    parts = zip(*(torch.split(hidden, LOGIT_ROWS) for hidden in kept), strict=True)
    logits = ((reference.logits(x).numpy(), quantized.logits(y).numpy()) for x, y in parts)
    return SolvedLayers(solved.weights, answer_score(logits, owner, has_picture, is_held_out))
