"""Time and memory of `verify`, stage by stage, and of `run`, for a bundle of a model of Apple's dimensions.

    python -m benchmarks.verify_cost [CHECKPOINT] [--recipe int4] [--target onnx]

Without a checkpoint one of the 0.5B model's shape with random weights is written. The recipe is taken without
data. Four pictures of the demo's questions are asked about, and the end of the context too. The limits for an
ONNX bundle at 0.5B on two cores: `verify` 90 s and 5 GB, `run` 1.1 GiB. Off a Mac, Core ML runs in the
interpreter. `verify` and `run` have a process each; a random network fails gates, which costs no less.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.random_checkpoint import write_checkpoint
from fastvlm_convert.peak_memory import peak_memory_bytes
from fastvlm_convert.pipeline import export
from fastvlm_convert.progress import ignore_stage
from fastvlm_convert.questions import Question, hard_questions
from fastvlm_convert.recipe import load_recipe, without_data
from fastvlm_convert.stage_costs import StageMeter
from fastvlm_convert.targets import known_target
from fastvlm_convert.verification.bundle import verify

NUM_PICTURES = 4
NEW_TOKENS = 16

# The child prints its own figures: what a parent sees includes the time before the program starts.
RUN = """
import os, sys
from fastvlm_convert.cli.main import main
from fastvlm_convert.peak_memory import peak_memory_bytes
code = main(["run", *sys.argv[1:], "--json"])
times = os.times()
print(times.user + times.system, peak_memory_bytes(), file=sys.stderr)
raise SystemExit(code)
"""


def shown_questions() -> list[Question]:
    """Questions about so many different pictures."""
    by_picture = {question.label: question for question in hard_questions() if question.images}
    return list(by_picture.values())[:NUM_PICTURES]


def run_row(bundle: Path, folder: Path) -> str:
    """The row of `run`: one picture, one answer."""
    picture = folder / "picture.png"
    shown_questions()[0].images[0].save(picture)
    asked = [str(bundle), str(picture), "What is this?", "--max-new-tokens", str(NEW_TOKENS)]
    code = [sys.executable, "-c", RUN, *asked]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout)
    seconds, peak = done.stderr.split()[-2:]
    return f"| run | | {float(seconds):.1f} | {int(peak) / 2**30:.2f} |"


def verify_rows(bundle: Path, checkpoint: Path) -> list[str]:
    """The rows of `verify`; for a process that has done nothing else."""
    meter = StageMeter(ignore_stage)
    result = verify(bundle, checkpoint, questions=shown_questions(), on_progress=meter)
    rows = [
        f"| {cost.stage} | {cost.seconds:.1f} | {cost.cpu_seconds:.1f} "
        f"| {cost.peak_memory_bytes / 2**30:.2f} |"
        for cost in meter.costs
    ]
    seconds, cpu = (sum(getattr(c, name) for c in meter.costs) for name in ("seconds", "cpu_seconds"))
    checks = f"{len(result.checks)} checks, {result.status}"
    return [*rows, f"| verify: {checks} | {seconds:.1f} | {cpu:.1f} | {peak_memory_bytes() / 2**30:.2f} |"]


def main() -> None:
    """Print one row per stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--target", default="onnx", choices=("onnx", "coreml"))
    parser.add_argument("--bundle", type=Path, help="verify this one of the checkpoint, and export none")
    arguments = parser.parse_args()
    if arguments.bundle and arguments.checkpoint:
        print("\n".join(verify_rows(arguments.bundle, arguments.checkpoint)), flush=True)
        return
    print("| stage | seconds | CPU seconds | peak GiB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = arguments.checkpoint or folder / "checkpoint"
        if not arguments.checkpoint:
            write_checkpoint(checkpoint, "0.5b")
        bundle, recipe = folder / "bundle", without_data(load_recipe(arguments.recipe))
        export(checkpoint, bundle, recipe=recipe, targets=known_target(arguments.target))
        print(run_row(bundle, folder), flush=True)
        again = [sys.executable, "-m", "benchmarks.verify_cost", str(checkpoint), "--bundle", str(bundle)]
        subprocess.run(again, check=True)


if __name__ == "__main__":
    main()
