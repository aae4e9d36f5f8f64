"""What the pictures that calibrate are worth: scenes alone, the default mix, and the checkpoint's own style.

    python -m benchmarks.calibration_mix --samples 64

All layers at 4 bits in blocks of 32 (as in `quantize_answers.py`), of the demo checkpoint and of the one of
the unseen style (`training/unseen`), judged on pictures of their own style that nothing was calibrated with:
clean ones, blurred and noisy ones. KL in nats over the tokens of the reference's answers, with 95 % bootstrap
intervals over questions, and without the worst 1 % of tokens; and what each calibration costs beside scenes
alone, of the same questions, with the interval of the ratio.
"""

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from benchmarks.quantize_answers import Test, ask, logits_of, ours
from fastvlm_convert import metrics
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.demo.camera import badly_taken
from fastvlm_convert.demo.draw import Draw
from fastvlm_convert.demo.samples import calibration_samples
from fastvlm_convert.intervals import bootstrap
from fastvlm_convert.quantization.calibration import Calibration, read_calibration
from fastvlm_convert.quantization.prepared_weights import prepare_weights
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.quantized.weight import dense_view
from fastvlm_convert.questions import Question
from fastvlm_convert.weights.fold import fold

if TYPE_CHECKING:
    from style import Style

ROOT = Path(__file__).parent.parent
CHECKPOINTS = {"demo": ROOT / "checkpoints" / "fastvlm-demo", "unseen": ROOT / "training/unseen/checkpoint"}
JUDGED_SEED, OWN_SEED = 1_000_500_000, 1_000_900_000  # of neither training nor calibration


def style_of(name: str) -> "Style":
    """The style of a checkpoint's pictures; the code that draws them lies where it was trained."""
    sys.path.insert(0, str(ROOT / "training"))
    from style import DEMO, UNSEEN

    return {"demo": DEMO, "unseen": UNSEEN}[name]


@dataclass(frozen=True)
class Judged:
    """A test, and which question each token of its answers belongs to, int64 [tokens]."""

    test: Test
    question: np.ndarray


def drawn(style: "Style", first: int, count: int, bad: bool) -> Iterator[tuple[Image.Image, list[str]]]:
    """Pictures of a style with three questions each."""
    for seed in range(first, first + count):
        draw = Draw(seed)
        scene = style.make(draw)
        image, texts = style.render(scene), [q.question for q in style.ask_all(scene, draw)]
        yield (badly_taken(image, seed) if bad else image), texts[seed % 3 :: 3][:3]


def judged(checkpoint: Checkpoint, style: "Style", count: int, bad: bool) -> Judged:
    """The reference's answers about pictures of a style."""
    test = ask(checkpoint, drawn(style, JUDGED_SEED, count, bad))
    lengths = [len(sample.answer) for sample in test.samples]
    return Judged(test, np.repeat(np.arange(len(lengths)), lengths))


def calibrations(checkpoint: Checkpoint, style: "Style", samples: int) -> dict[str, Calibration]:
    """The ways to calibrate that are compared."""
    settings = replace(ours(fold(checkpoint.weights), "all", scheme="int4", block_size=32).calibration)
    scenes = [Question((image,), q.question) for image, q in calibration_samples(samples)]
    own = [
        Question((image,), texts[0])
        for n in range(samples)
        for image, texts in drawn(style, OWN_SEED + n, 1, bad=n % 2 == 1)
    ]
    return {
        "scenes alone": named(scenes),
        "default mix": read_calibration(None, replace(settings, num_samples=samples), checkpoint.tokenizer),
        "own style": named(own),
    }


def named(questions: Sequence[Question]) -> Calibration:
    """A calibration, with a hash of it."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(question.text.encode())
        for image in question.images:
            digest.update(image.tobytes())
    return Calibration(tuple(questions), digest.hexdigest())


def ratio(values: np.ndarray) -> float:
    """The second column's sum by the first's."""
    first, second = values.sum(axis=0)
    return float(second / first)


def compare(name: str, count: int, samples: int) -> None:
    """Print the rows of a checkpoint."""
    checkpoint, style = open_checkpoint(CHECKPOINTS[name]), style_of(name)
    tests = {"clean": judged(checkpoint, style, count, False), "bad": judged(checkpoint, style, count, True)}
    first: dict[str, np.ndarray] = {}
    for label, data in calibrations(checkpoint, style, samples).items():
        recipe = ours(
            fold(checkpoint.weights), "all", scheme="int4", block_size=32, symmetric=False, solver="gptq"
        )
        recipe = replace(recipe, calibration=replace(recipe.calibration, num_samples=samples))
        weights = dense_view(prepare_weights(plan_weights(checkpoint, recipe), data).weights)
        for kind, found in tests.items():
            logits = logits_of(checkpoint, weights, found.test)
            kl = metrics.kl_divergence(found.test.logits, logits)
            interval = partial(bootstrap, clusters=found.question)
            before = first.setdefault(kind, kl)
            spread, change = interval(kl), interval(np.stack([before, kl], -1), statistic=ratio)
            top1 = float((found.test.logits.argmax(-1) == logits.argmax(-1)).mean())
            most = np.sort(kl)[: int(0.99 * len(kl))].mean()
            print(
                f"| {name} | {kind} | {label} | {kl.mean():.2e} [{spread.low:.1e}, {spread.high:.1e}] | "
                f"{most:.1e} | {kl.mean() / before.mean():.2f} [{change.low:.2f}, {change.high:.2f}] | "
                f"{top1:.2%} |",
                flush=True,
            )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=300, help="judged on, three questions each")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--checkpoints", nargs="+", choices=CHECKPOINTS, default=list(CHECKPOINTS))
    arguments = parser.parse_args()
    print("| checkpoint | pictures | calibrated on | KL | without the worst 1 % ", end="")
    print("| beside scenes alone | top-1 |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("FASTVLM_CONVERT_CACHE", cache)
        for name in arguments.checkpoints:
            compare(name, arguments.pictures, arguments.samples)


if __name__ == "__main__":
    main()
