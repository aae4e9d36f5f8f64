"""Layers of a golden checkpoint solved with data, step by step and cheaply."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.quantization.answers import CalibrationSet, TokenBatch, collect_samples, token_batch
from fastvlm_convert.quantization.block_solver import SolverTask
from fastvlm_convert.quantization.calibration import Calibration, read_calibration
from fastvlm_convert.quantization.data_free import quantize_weights
from fastvlm_convert.quantization.layerwise import LayerwiseResult, solve_layerwise
from fastvlm_convert.quantization.token_weights import squared_gradients
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.quantized.layer_plan import LayerPlan, plan_layers
from fastvlm_convert.quantized.weight import MixedSource, StoredWeight, dense_view
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.recipe_settings import CalibrationSettings, QuantizeRule
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.source import WeightSource
from tests.bundles import recipe
from tests.checkpoints import LLAVA, golden_checkpoint

INT4 = {"scheme": "int4", "block_size": 16, "symmetric": False, "solver": "gptq"}
DECODER = QuantizeRule(("decoder.layers.*",), **INT4)
INT8 = QuantizeRule(("*",), "int8")
# Every kind of layer that can be solved, and both solvers.
RULES = (
    DECODER,
    QuantizeRule(("vision.stages.3.blocks.*.attention.*", "projector.*"), **INT4),
    QuantizeRule(("vision.stages.*.fc1", "vision.final.se.*"), "int8", solver="weighted"),
    INT8,
)
SETTINGS = CalibrationSettings(num_samples=3, max_tokens=90)


def calibrated_recipe(*rules: QuantizeRule, **calibration: object) -> Recipe:
    """A recipe with some rules, `RULES` by default, and few samples."""
    return replace(
        recipe("int4"),
        name="calibrated",
        quantize=rules or RULES,
        calibration=replace(SETTINGS, **calibration),
    )


@cache
def generated() -> Calibration:
    """The first of the mix, with pictures; the last has a short answer, so that its sample is padded."""
    mixed = read_calibration(None, SETTINGS, golden_checkpoint(LLAVA).tokenizer).questions
    *asked, last = mixed[: SETTINGS.num_samples]
    return Calibration((*asked, replace(last, answer="Red.")), "generated, the last one answered")


@cache
def golden_answers() -> CalibrationSet:
    """What the golden checkpoint says to them."""
    return collect_samples(plan_weights(golden_checkpoint(LLAVA), calibrated_recipe()), generated())


@cache
def floats() -> WeightSource:
    """The golden checkpoint's weights, folded."""
    return fold(golden_checkpoint(LLAVA).weights)


@cache
def float_chain() -> BlockStreamer:
    """The golden checkpoint."""
    return BlockStreamer(golden_checkpoint(LLAVA).config, floats())


@cache
def golden_batch() -> TokenBatch:
    """Its samples side by side."""
    data = golden_answers()
    return token_batch(data.samples, torch.from_numpy(data.features), float_chain().embed)


@cache
def golden_weights() -> dict[str, torch.Tensor]:
    """How sensitive its answers are to errors at each token, by layer."""
    return squared_gradients(float_chain(), golden_batch(), lambda share: None)


@cache
def golden_hidden() -> torch.Tensor:
    """The residual stream that predicts the answers' tokens in the golden checkpoint."""
    return hidden_of(float_chain())


@dataclass(frozen=True)
class Run:
    """Layers solved in a folder."""

    task: SolverTask
    solved: LayerwiseResult
    searched: MixedSource

    @property
    def weights(self) -> dict[str, StoredWeight]:
        return {**self.searched, **self.solved.weights}

    @property
    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.task.folder.iterdir())}

    def hidden(self) -> torch.Tensor:
        """The residual stream of a model that holds the stored weights from the start."""
        return hidden_of(BlockStreamer(golden_checkpoint(LLAVA).config, dense_view(self.weights)))


def plans_of(settings: Recipe) -> tuple[LayerPlan, ...]:
    """What a recipe does to the golden checkpoint."""
    return plan_layers({name: weight.shape for name, weight in floats().items()}, settings)


def run(
    folder: Path,
    settings: Recipe,
    *,
    weights: WeightSource | None = None,
    only: Callable[[str], bool] = lambda layer: True,
    token_weights: Mapping[str, torch.Tensor] | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
    has_fine_encoder: bool = False,
) -> Run:
    """Solve the golden checkpoint's layers in a folder.

    Args:
        folder: Where solved layers are saved.
        settings: The recipe.
        weights: What the layers that are not to be solved hold; the recipe's by default.
        only: Which layers to solve, of those that the recipe solves.
        token_weights: Those measured by default.
        on_progress: Called with the share of the decoder's layers that is solved.
        has_fine_encoder: See `SolverTask`.
    """
    plans = plans_of(settings)
    searched = quantize_weights(floats(), plans)
    todo = {p.layer: p for p in plans if p.scheme and p.solver != "search" and only(p.layer)}
    chain = BlockStreamer(golden_checkpoint(LLAVA).config, weights or dense_view(searched))
    measured = golden_weights() if token_weights is None else token_weights
    folder.mkdir(exist_ok=True)
    task = SolverTask(
        float_chain(), chain, todo, settings.calibration, golden_answers(), measured, folder, has_fine_encoder
    )

    def on_stage(stage: str, share: float) -> None:
        if stage == "layers":
            on_progress(share)

    return Run(task, solve_layerwise(task, on_stage), searched)


@torch.no_grad()
def hidden_of(chain: BlockStreamer) -> torch.Tensor:
    """The residual stream that predicts the answers' tokens, of a whole model from the pixels on."""
    x = torch.cat(list(golden_answers().pictures))
    for block in chain.vision_blocks():
        x = chain.run(chain.load(block), x)
    batch = token_batch(golden_answers().samples, x, chain.embed)
    x = batch.embeds * chain.config.decoder.residual_scale
    for block in chain.decoder_blocks():
        x = chain.run(chain.load(block), x)
    return x[batch.answers]


def sqnr(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """Signal to noise in decibels."""
    noise = (reference - candidate).double().square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))
