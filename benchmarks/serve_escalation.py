"""What escalation in `serve` costs and gains: accuracy and CPU time for every threshold.

    python -m benchmarks.serve_escalation SMALL LARGE [--pictures 60] [--taken well|badly|twice]
    python -m benchmarks.serve_escalation --crude [CHECKPOINT]

SMALL and LARGE are ONNX bundles of the demo or of its siblings. `--crude` exports two: one at 4 bits a weight
with one scale a channel in the encoder, coarser than any shipped recipe, and one in float32.

Every question is asked of both, greedily, as `serve` asks it; a threshold then decides which would have
been escalated. An escalated answer costs both. Intervals are bootstraps over pictures.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fastvlm_convert.demo.camera import badly_taken, double_exposure
from fastvlm_convert.demo.samples import HELD_OUT_SEED, Sample, make_sample
from fastvlm_convert.intervals import bootstrap, paired_bootstrap, too_few
from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle
from fastvlm_convert.serve.engine import Question, Reply, Sampling
from fastvlm_convert.serve.engines.sequence import answer_question
from fastvlm_convert.verification.accuracy import MAX_ANSWER_TOKENS

DEMO = Path(__file__).parent.parent / "checkpoints" / "fastvlm-demo"
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # of answers escalated, for the thresholds
CRUDE = (
    QuantizeRule(("decoder.embed_tokens", "decoder.lm_head"), "int8", 128),
    QuantizeRule(("decoder.*",), "int4", 128, symmetric=True),
    QuantizeRule(("*",), "int4"),
)


@dataclass(frozen=True)
class Answers:
    """What a bundle said to all questions.

    Attributes:
        right: Whether an answer is the expected text, 0 or 1 a question.
        logprob: Mean log-probability of its tokens.
        cpu_s: Processor time of this process that it took, the picture's preparation included.
    """

    right: np.ndarray
    logprob: np.ndarray
    cpu_s: np.ndarray


@dataclass(frozen=True)
class Row:
    """One threshold.

    Attributes:
        threshold: Mean log-probability below which an answer is escalated.
        right: Whether the answer that a client gets is right, a question each.
        escalated: Whether it is the large bundle's.
        cpu_s: What it cost.
    """

    threshold: float
    right: np.ndarray
    escalated: np.ndarray
    cpu_s: np.ndarray


def row(threshold: float, small: Answers, large: Answers) -> Row:
    """What clients would have got with a threshold."""
    escalated = small.logprob < threshold
    return Row(
        threshold,
        np.where(escalated, large.right, small.right),
        escalated,
        small.cpu_s + np.where(escalated, large.cpu_s, 0.0),
    )


def pictures(count: int, taken: str) -> Iterator[tuple[Sample, Image.Image]]:
    """Held-out samples, and their pictures as they are asked about."""
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + count):
        sample = make_sample(seed)
        image = sample.image
        if taken == "badly":
            image = badly_taken(image, seed)
        elif taken == "twice":
            image = double_exposure(image, make_sample(seed + count).image)
        yield sample, image


def ask(model: LoadedModel, count: int, taken: str) -> tuple[Answers, list[int]]:
    """Ask every question of every picture; the answers, and the number of each one's picture."""
    rows: list[tuple[bool, float, float]] = []
    clusters: list[int] = []
    for number, (sample, image) in enumerate(pictures(count, taken)):
        for question in sample.questions:
            began = time.process_time()
            reply = _reply(model, question.question, image)
            cpu_s = time.process_time() - began
            rows.append((reply.text == question.answer, reply.mean_logprob or 0.0, cpu_s))
            clusters.append(number)
    right, logprob, cpu_s = (np.asarray(column, np.float64) for column in zip(*rows, strict=True))
    return Answers(right, logprob, cpu_s), clusters


def _reply(model: LoadedModel, text: str, image: Image.Image) -> Reply:
    sampling = Sampling(max_tokens=MAX_ANSWER_TOKENS)
    prompt = model.prompt(text, [image])
    question = Question("benchmark", prompt, (), sampling, math.inf, wants_logprob=True)
    *_, reply = answer_question(model, question)
    assert isinstance(reply, Reply)
    return reply


def print_table(small: Answers, large: Answers, clusters: Sequence[int]) -> None:
    """One row a threshold, from none escalated to all."""
    print("| threshold | escalated | right | more than small | CPU ms a question | of large alone |")
    print("|---|---|---|---|---|---|")
    enough = too_few(len(set(clusters))) is None
    for threshold in thresholds(small.logprob):
        one = row(threshold, small, large)
        right, gain = f"{100 * one.right.mean():.1f} %", f"{100 * (one.right - small.right).mean():+.1f}"
        if enough:
            of = bootstrap(one.right, clusters=clusters)
            right += f" ({100 * of.low:.1f} to {100 * of.high:.1f})"
            by = paired_bootstrap(one.right, small.right, clusters=clusters)
            gain += f" ({100 * by.low:+.1f} to {100 * by.high:+.1f})"
        name = {-math.inf: "none", math.inf: "all"}.get(threshold, f"{threshold:.2g}")
        cost = one.cpu_s.mean() / large.cpu_s.mean()
        print(
            f"| {name} | {100 * one.escalated.mean():.1f} % | {right} | {gain} "
            f"| {1000 * one.cpu_s.mean():.1f} | {cost:.2f} |"
        )
    of_large = bootstrap(large.right, clusters=clusters) if enough else None
    interval = "" if of_large is None else f" ({100 * of_large.low:.1f} to {100 * of_large.high:.1f})"
    gain = f"{100 * (large.right - small.right).mean():+.1f}"
    print(
        f"| large alone | - | {100 * large.right.mean():.1f} %{interval} | {gain} "
        f"| {1000 * large.cpu_s.mean():.1f} | 1.00 |"
    )
    print(too_few(len(set(clusters))) or "", flush=True)
    wrong = small.right == 0
    if 0 < wrong.sum() < len(wrong):
        print(f"a wrong answer is less sure than a right one in {100 * separation(small):.1f} % of pairs")


def thresholds(logprob: np.ndarray) -> list[float]:
    """Thresholds that escalate about the shares of `SHARES`."""
    inner = {float(np.quantile(logprob, share)) for share in SHARES[1:-1]}
    return [-math.inf, *sorted(inner), math.inf]


def separation(answers: Answers) -> float:
    """Probability that of a right and a wrong answer the wrong one has the lower log-probability."""
    right, wrong = answers.logprob[answers.right == 1], answers.logprob[answers.right == 0]
    lower = (wrong[:, None] < right[None, :]).mean() + 0.5 * (wrong[:, None] == right[None, :]).mean()
    return float(lower)


def crude_pair(checkpoint: Path, folder: Path) -> tuple[Path, Path]:
    """A bundle at 4 bits and one scale a channel, and one in float32."""
    crude = replace(load_recipe("int4"), name="crude", quantize=CRUDE)
    small = export(checkpoint, folder / "crude", recipe=crude, targets=["onnx"]).bundle
    large = export(checkpoint, folder / "fp32", recipe=load_recipe("fp32"), targets=["onnx"]).bundle
    return small, large


def main() -> None:
    """Print a table a way of taking pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="*", metavar="SMALL LARGE")
    parser.add_argument("--crude", action="store_true")
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--taken", action="append", choices=("well", "badly", "twice"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.crude:
            small, large = crude_pair(*arguments.bundles or (DEMO,), Path(folder))
        else:
            small, large = arguments.bundles
        for taken in arguments.taken or ("well", "badly", "twice"):
            first, clusters = ask(load_bundle(small, "onnx"), arguments.pictures, taken)
            second, _ = ask(load_bundle(large, "onnx"), arguments.pictures, taken)
            print(f"\n{small.name} -> {large.name}, pictures taken {taken}: {len(clusters)} questions\n")
            print_table(first, second, clusters)


if __name__ == "__main__":
    main()
