"""Time and peak memory of quantizing a model of Apple's dimensions (random weights), stage by stage.

    python -m benchmarks.quantize_cost [0.5b|1.5b|7b] [--recipe int4] [--checkpoint FOLDER]
    python -m benchmarks.quantize_cost --layers 2 --samples 8       # takes minutes; extrapolate from it

Calibrated with the demo generator's pictures, questions and answers, because a random model would never end
an answer; the stage "answers" is then one pass over the pictures. Limits at 0.5B on two cores: layers solved
within 15 minutes, not counting the answers, which are computed once and kept; a peak below 6 GB.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.random_checkpoint import write_checkpoint
from fastvlm_convert.demo.samples import calibration_samples
from fastvlm_convert.peak_memory import peak_memory_bytes
from fastvlm_convert.pipeline import quantize
from fastvlm_convert.recipe import load_recipe


def write_calibration(folder: Path, count: int) -> Path:
    """Write pictures with questions and answers, as `--calibration` takes them."""
    folder.mkdir()
    entries = []
    for number, (image, question) in enumerate(calibration_samples(count)):
        image.save(folder / f"{number}.png")
        entries.append({"image": f"{number}.png", "question": question.question, "answer": question.answer})
    (folder / "questions.json").write_text(json.dumps(entries))
    return folder


def main() -> None:
    """Print one row per stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", nargs="?", default="0.5b")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--layers", type=int, help="decoder layers, to extrapolate from")
    parser.add_argument("--samples", type=int, help="instead of the recipe's")
    arguments = parser.parse_args()
    marks: dict[str, tuple[float, float, int]] = {}

    def on_progress(stage: str, share: float) -> None:
        marks[stage] = (time.perf_counter(), time.process_time(), peak_memory_bytes())
        if share == 1.0:
            print(f"# {stage} done after {time.perf_counter() - start:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            checkpoint = Path(folder) / "checkpoint"
            write_checkpoint(checkpoint, arguments.size, arguments.layers)
        start, start_cpu = time.perf_counter(), time.process_time()
        recipe, output = load_recipe(arguments.recipe), Path(folder) / "out"
        if arguments.samples:
            fewer = replace(recipe.calibration, num_samples=arguments.samples)
            recipe = replace(recipe, calibration=fewer)
        data = write_calibration(Path(folder) / "pictures", recipe.calibration.num_samples)
        quantize(checkpoint, output, recipe=recipe, calibration=data, on_progress=on_progress)
        size = sum(path.stat().st_size for path in (Path(folder) / "out").iterdir())
    print("| stage | seconds | CPU seconds | peak GB so far |\n|---|---|---|---|")
    last, last_cpu = start, start_cpu
    for stage, (wall, cpu, peak) in marks.items():
        print(f"| {stage} | {wall - last:.0f} | {cpu - last_cpu:.0f} | {peak / 1e9:.2f} |")
        last, last_cpu = wall, cpu
    print(f"\n{arguments.recipe}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
