"""Time and peak memory of quantizing a model of Apple's dimensions (random weights), stage by stage.

    python -m benchmarks.quantize_cost [0.5b|1.5b|7b] [--recipe int4] [--checkpoint FOLDER]
    python -m benchmarks.quantize_cost --layers 2 --samples 8       # takes minutes; extrapolate from it

Every sample is as long as the recipe lets it be: a picture of the demo generator, a long question, and 64
tokens of answer, for a model of random weights never ends one. Nothing is read from the user's cache. Limits
for 64 samples at 0.5B on two cores: 15 minutes and 4 GB, 8 minutes with the answers at hand; on a busy
machine, 1800 and 960 CPU seconds. What each stage has taken is also printed on the way, with the time of day.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.random_checkpoint import write_checkpoint
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.demo.samples import calibration_samples
from fastvlm_convert.peak_memory import peak_memory_bytes
from fastvlm_convert.pipeline import quantize
from fastvlm_convert.prompt import prompt_and_pictures, user_message
from fastvlm_convert.quantization.answers import MAX_ANSWER_TOKENS
from fastvlm_convert.quantization.weight_plan import WeightPlan, plan_weights
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.stage_costs import StageCost, StageMeter

FILLER = " And what else?"


def write_calibration(folder: Path, count: int) -> Path:
    """Write pictures with questions and answers, as `--calibration` takes them."""
    folder.mkdir()
    entries = []
    for number, (image, question) in enumerate(calibration_samples(count)):
        image.save(folder / f"{number}.png")
        entries.append({"image": f"{number}.png", "question": question.question, "answer": question.answer})
    (folder / "questions.json").write_text(json.dumps(entries))
    return folder


def write_long_calibration(folder: Path, plan: WeightPlan) -> Path:
    """The same without answers, and with questions that leave room for just the longest answer."""
    settings, tokenizer = plan.recipe.calibration, plan.checkpoint.tokenizer
    listing = write_calibration(folder, settings.num_samples) / "questions.json"
    room = settings.max_tokens - MAX_ANSWER_TOKENS - plan.config.vision.num_image_tokens
    entries = json.loads(listing.read_text())
    for entry in entries:
        del entry["answer"]
        while True:
            longer = entry["question"] + FILLER
            prompt, _ = prompt_and_pictures([user_message(longer, [])], plan.prompt, tokenizer)
            if sum(map(len, prompt.segments)) + 1 > room:  # the picture's line break
                break
            entry["question"] = longer
    listing.write_text(json.dumps(entries))
    return folder


def table(costs: tuple[StageCost, ...]) -> str:
    """A row for each stage, one for all, and one for all but the answers."""
    rows = ["| stage | seconds | CPU seconds | peak GB |", "|---|---|---|---|"]
    for label, chosen in (
        *((cost.stage, [cost]) for cost in costs),
        ("all", costs),
        ("all but answers", [cost for cost in costs if cost.stage != "answers"]),
    ):
        wall, cpu = sum(c.seconds for c in chosen), sum(c.cpu_seconds for c in chosen)
        peak = max(c.peak_memory_bytes for c in chosen)
        rows.append(f"| {label} | {wall:.0f} | {cpu:.0f} | {peak / 1e9:.2f} |")
    return "\n".join(rows)


def main() -> None:
    """Print one row per stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", nargs="?", default="0.5b")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--layers", type=int, help="decoder layers, to extrapolate from")
    parser.add_argument("--samples", type=int, help="instead of the recipe's")
    arguments = parser.parse_args()

    def show(stage: str, share: float) -> None:
        cost = next(cost for cost in meter.costs if cost.stage == stage)
        print(
            f"# {time.strftime('%H:%M:%S')} {stage} {share:.0%}: {cost.seconds:.0f} s, "
            f"{cost.cpu_seconds:.0f} CPU s, {cost.peak_memory_bytes / 1e9:.2f} GB",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["FASTVLM_CONVERT_CACHE"] = str(folder / "cache")
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            checkpoint = folder / "checkpoint"
            write_checkpoint(checkpoint, arguments.size, arguments.layers)
        recipe = load_recipe(arguments.recipe)
        if arguments.samples:
            fewer = replace(recipe.calibration, num_samples=arguments.samples)
            recipe = replace(recipe, calibration=fewer)
        plan = plan_weights(open_checkpoint(checkpoint), recipe)
        data = write_long_calibration(folder / "pictures", plan)
        meter = StageMeter(show)
        quantize(checkpoint, folder / "out", recipe=recipe, calibration=data, on_progress=meter)
        size = sum(path.stat().st_size for path in (folder / "out").iterdir())
    print(table(meter.costs))
    print(f"\n{arguments.recipe}: {size / 1e6:.1f} MB; peak {peak_memory_bytes() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
