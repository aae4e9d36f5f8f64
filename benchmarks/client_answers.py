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

from fastvlm_convert.demo.samples import HELD_OUT_SEED, Sample, make_sample
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import Recipe, load_recipe, without_data
from tests.clients.transformers_js import Task, ask_ours, ask_transformers_js

DEMO = Path(__file__).parent.parent / "checkpoints" / "fastvlm-demo"
NEW_TOKENS = 64


def not_square() -> Iterator[Sample]:
    """Held-out samples whose picture is wider than high, or higher than wide."""
    for seed in itertools.count(HELD_OUT_SEED):
        sample = make_sample(seed)
        if sample.image.width != sample.image.height:
            yield sample


def write_tasks(count: int, folder: Path) -> list[Task]:
    """Pictures as files, one question each; the kinds of questions take turns."""
    tasks = []
    for index, sample in enumerate(itertools.islice(not_square(), count)):
        file = folder / f"{index:03d}.png"
        sample.image.save(file)
        tasks.append(Task(file, sample.questions[index % len(sample.questions)].question))
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
            print(
                f"| {preprocessing} | "
                f"{equal_answers(given.checkpoint, recipe, tasks, folder)} of {len(tasks)} |"
            )


if __name__ == "__main__":
    main()
