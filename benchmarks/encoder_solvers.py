"""What solvers do to the image tokens of pictures that they have not seen.

    python -m benchmarks.encoder_solvers

Encoder and projector alone are quantized, calibrated with the generator's scenes, and judged on other
pictures of the checkpoint's own style, half of them blurred and noisy: demo scenes, and boards of the unseen
style (`training/unseen`). The error is the image tokens' squared error over their squared sum; it is compared
with the first row of its kind, with the 95 % bootstrap interval of the ratio over pictures.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.quantize_answers import FLOAT, ours
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.demo.camera import badly_taken
from fastvlm_convert.demo.draw import Draw
from fastvlm_convert.demo.samples import calibration_samples
from fastvlm_convert.intervals import bootstrap
from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.prompt import build_prompt, user_message
from fastvlm_convert.quantization import block_solver
from fastvlm_convert.quantization.answers import CalibrationSet
from fastvlm_convert.quantization.block_solver import Activations, SolverTask, solve_block
from fastvlm_convert.quantization.data_free import quantize_weights
from fastvlm_convert.quantized.layer_plan import plan_layers
from fastvlm_convert.quantized.weight import dense_view
from fastvlm_convert.recipe import Recipe, load_recipe
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.parts import stream_reader_of

if TYPE_CHECKING:
    from PIL import Image

ROOT = Path(__file__).parent.parent
CHECKPOINTS = {"demo": ROOT / "checkpoints" / "fastvlm-demo", "unseen": ROOT / "training/unseen/checkpoint"}
JUDGED_SEED = 1_000_500_000  # of neither training nor calibration
LINEAR = tuple(f"vision.*.{layer}" for layer in ("fc1", "fc2", "qkv", "proj", "downsample.1"))


def own_pictures(name: str, count: int) -> "Iterator[Image.Image]":
    """Pictures of a checkpoint's style; the code that draws them lies where it was trained."""
    sys.path.insert(0, str(ROOT / "training"))
    from style import DEMO, UNSEEN

    style = {"demo": DEMO, "unseen": UNSEEN}[name]
    for seed in range(JUDGED_SEED, JUDGED_SEED + count):
        image = style.render(style.make(Draw(seed)))
        yield badly_taken(image, seed) if seed % 2 else image


@dataclass(frozen=True)
class Judge:
    """A checkpoint, the pictures that calibrate it and those that judge; pixels are float32 [n, 3, S, S]."""

    checkpoint: Checkpoint
    calibrations: list[np.ndarray]
    pixels: torch.Tensor

    @classmethod
    def of(cls, name: str, pictures: int, samples: int, sets: int) -> "Judge":
        """A checkpoint by name, with so many calibrations of so many pictures."""
        checkpoint = open_checkpoint(CHECKPOINTS[name])

        def pixels(images: "Iterator[Image.Image]") -> np.ndarray:
            form, settings = checkpoint.prompt.format, checkpoint.pictures.image
            messages = ([user_message("?", [image])] for image in images)
            prompts = [build_prompt(m, form, checkpoint.tokenizer, settings) for m in messages]
            return np.concatenate([prompt.images[0] for prompt in prompts])

        scenes = pixels(image for image, _ in calibration_samples(samples * sets))
        judged = torch.from_numpy(pixels(own_pictures(name, pictures)))
        return cls(checkpoint, np.split(scenes, sets), judged)

    @torch.no_grad()
    def errors(self, recipe: Recipe) -> np.ndarray:
        """Relative squared error of every picture's tokens behind every calibration, [sets, pictures]."""
        config, weights = self.checkpoint.config, fold(self.checkpoint.weights)
        plans = plan_layers({name: weight.shape for name, weight in weights.items()}, recipe)
        searched = quantize_weights(weights, plans)
        todo = {plan.layer: plan for plan in plans if plan.scheme and plan.solver != "search"}
        reference, quantized = BlockStreamer(config, weights), BlockStreamer(config, dense_view(searched))
        expected, found = reference.encode(self.pixels.split(8)), []
        for scenes in self.calibrations:
            with tempfile.TemporaryDirectory() as folder:
                data = CalibrationSet(scenes, np.zeros(0), (), 0)
                task = SolverTask(reference, quantized, todo, recipe.calibration, data, {}, Path(folder))
                x = torch.from_numpy(scenes)
                states, solved = Activations(x, x), {}
                for block in quantized.vision_blocks():
                    states, stored = solve_block(task, block, states, None)
                    solved |= stored
                made = {**dense_view(searched), **dense_view(solved)}
                tokens = BlockStreamer(config, made).encode(self.pixels.split(8))
            misses = (tokens - expected).double().square().sum((1, 2))
            found.append((misses / expected.double().square().sum((1, 2))).numpy())
        return np.stack(found)


def recipe_of(judge: Judge, bits: str, solver: str) -> Recipe:
    """`32` or `128` for int4 in such blocks, or `int8` per channel, of encoder and projector."""
    if bits == "int8":
        rules = (
            QuantizeRule((*LINEAR, "projector.*"), "int8", solver=solver),
            QuantizeRule(("vision.*",), "int8"),
            FLOAT,
        )  # type: ignore[arg-type]
        return replace(load_recipe("int8"), quantize=rules)
    four = {"scheme": "int4", "block_size": int(bits), "symmetric": False, "solver": solver}
    found = ours(fold(judge.checkpoint.weights), "vision", **four)
    return replace(found, quantize=(QuantizeRule(("projector.*",), **four), *found.quantize))  # type: ignore[arg-type]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--samples", type=int, default=64, help="pictures of a calibration")
    parser.add_argument("--sets", type=int, default=3, help="calibrations")
    asked = parser.parse_args()
    print("| model | layers | solver | signal to noise, dB | error beside the first |\n|---|---|---|---|---|")
    for name in CHECKPOINTS:
        judge = Judge.of(name, asked.pictures, asked.samples, asked.sets)
        first: dict[str, np.ndarray] = {}
        for bits, solver, aim in (
            ("32", "gptq", "own output"), ("32", "gptq", "residual stream"),
            ("128", "gptq", "own output"), ("128", "gptq", "residual stream"),
            ("int8", "search", ""), ("int8", "gptq", "residual stream"),
        ):  # fmt: skip
            block_solver.stream_reader_of = stream_reader_of if aim != "own output" else lambda _: None  # type: ignore[assignment]
            errors = judge.errors(recipe_of(judge, bits, solver))
            pairs = np.stack([errors, first.setdefault(bits, errors)], -1).mean(0)
            spread = bootstrap(pairs, statistic=lambda x: float(x[:, 0].sum() / x[:, 1].sum()))
            ratio = pairs[:, 0].sum() / pairs[:, 1].sum()
            print(
                f"| {name} | {bits} | {solver} {aim} | {-10 * np.log10(errors.mean()):.2f} | "
                f"{ratio:.2f} [{spread.low:.2f}, {spread.high:.2f}] |",
                flush=True,
            )


if __name__ == "__main__":
    main()
