"""Do transformers.js and `run` agree on pictures that are not square? Clients resize in ways of their own.

    python -m benchmarks.client_answers [CHECKPOINT] [--pictures 200] [--recipe fp16]

One row a bundle: with the plain vision graph, and with the reference's preprocessing inside it. Peer: the
same bundle in `fastvlm-convert run`. Limit: every answer equal, token for token, where preprocessing is in
the graph.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from fastvlm_convert.demo.camera import badly_taken
from fastvlm_convert.demo.samples import HELD_OUT_SEED, make_sample
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import Recipe, load_recipe, without_data
from tests.clients.transformers_js import Task, ask_ours, ask_transformers_js

DEMO = Path(__file__).parent.parent / "checkpoints" / "fastvlm-demo"
NEW_TOKENS = 64


def not_square() -> Iterator[Image.Image]:
    """Held-out pictures, wider than high or higher than wide; badly taken, so that little decides."""
    for seed in itertools.count(HELD_OUT_SEED):
        image = badly_taken(make_sample(seed).image, seed)
        if image.width != image.height:
            yield image


def write_tasks(count: int, folder: Path) -> list[Task]:
    """Pictures as files, and the question with the longest answers about each."""
    tasks = []
    for index, image in enumerate(itertools.islice(not_square(), count)):
        file = folder / f"{index:03d}.png"
        image.save(file)
        tasks.append(Task(file, "Describe the image."))
    return tasks


def equal_answers(checkpoint: Path, recipe: Recipe, tasks: list[Task], folder: Path) -> int:
    """How many answers of transformers.js have the tokens of ours."""
    bundle = folder / recipe.onnx.preprocessing
    export(checkpoint, bundle, recipe=recipe, targets="onnx")
    (theirs,) = ask_transformers_js(folder, [(bundle.name, {})], tasks, folder, NEW_TOKENS)
    assert not isinstance(theirs, str), theirs
    return sum(a == b for a, b in zip(ask_ours(bundle, tasks, NEW_TOKENS), theirs, strict=True))


def main() -> None:
    """Print one row per bundle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--recipe", default="fp16")
    given = parser.parse_args()
    base = without_data(load_recipe(given.recipe))
    print("| onnx.preprocessing | answers equal |")
    print("|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks = write_tasks(given.pictures, folder)
        for preprocessing in ("client", "in_graph"):
            recipe = replace(base, onnx=replace(base.onnx, preprocessing=preprocessing))
            equal = equal_answers(given.checkpoint, recipe, tasks, folder)
            print(f"| {preprocessing} | {equal} of {len(tasks)} |")


if __name__ == "__main__":
    main()
