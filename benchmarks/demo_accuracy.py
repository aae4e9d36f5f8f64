"""Accuracy of the demo checkpoint on held-out pictures: the reference, and ONNX bundles of several recipes.

    python -m benchmarks.demo_accuracy [CHECKPOINT] [--pictures 500] [--recipe int4 --recipe int4-small]

Limit: at least 95 % of all answers exactly right, and bundles within half a point of the reference.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.demo.samples import held_out
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.runtime.loaded import load_bundle, load_reference
from fastvlm_convert.verification.accuracy import Score, accuracy

RECIPES = ("fp32", "fp16", "int8", "int4")
DEMO = Path(__file__).parent.parent / "checkpoints" / "fastvlm-demo"


def scores(checkpoint: Path, pictures: int, recipes: Sequence[str]) -> dict[str, dict[str, Score]]:
    """Scores by contender and kind of question."""
    samples = held_out(pictures)
    found = {"reference": accuracy(load_reference(open_checkpoint(checkpoint)), samples)}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in recipes:
            result = export(checkpoint, Path(folder) / recipe, recipe=load_recipe(recipe), targets=["onnx"])
            found[f"{recipe} onnx"] = accuracy(load_bundle(result.bundle, "onnx"), samples)
    return found


def main() -> None:
    """Print one row per kind of question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--recipe", action="append", help="instead of fp32, fp16, int8 and int4")
    arguments = parser.parse_args()
    found = scores(arguments.checkpoint, arguments.pictures, arguments.recipe or RECIPES)
    print(f"| kind | questions | {' | '.join(found)} |")
    print("|---|---|" + "---|" * len(found))
    reference = found["reference"]
    for kind in sorted(reference, key=lambda k: (k == "all", k)):
        cells = " | ".join(f"{100 * score[kind].share:.1f} %" for score in found.values())
        print(f"| {kind} | {reference[kind].total} | {cells} |")


if __name__ == "__main__":
    main()
