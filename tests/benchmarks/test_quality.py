"""The figures of benchmarks.quality: from measured tokens to tables, and the measuring itself."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.quality.figures import Figure, better, ends_of_a_check, figures, ratio, trimmed, verdict
from benchmarks.quality.inputs import DEMO, FIRST_SEED, PICTURES, PROMPTS, QuestionSet, names_one, pictures
from benchmarks.quality.judging import answered, judge, load, prepare, read_again, right_answers
from benchmarks.quality.table import difference, factor, tables
from fastvlm_convert import metrics
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.demo.samples import CALIBRATION_SEED
from fastvlm_convert.generate import generate, teacher_forced
from fastvlm_convert.intervals import Interval
from fastvlm_convert.model.fastvlm import load_model
from fastvlm_convert.model.session import TorchSession
from fastvlm_convert.prompt import build_prompt, user_message
from fastvlm_convert.prompt_reading import embed_prompt
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.source import Weight, computed

COUNT = 40


def measured(kl: float, right: int = 1) -> dict:
    """Forty answers of two tokens, every fourth of which changes; the second token costs thrice the first."""
    return {
        "kl": [[kl, 3 * kl]] * COUNT,
        "agree": [[1, int(n % 4 > 0)] for n in range(COUNT)],
        "right": [right if n % 2 else None for n in range(COUNT)],
        "entropy": 0.5,
    }


def test_figures_of_tokens_and_answers():
    found = figures(measured(0.1, right=0), measured(0.0), range(COUNT))
    assert found.kl.value == pytest.approx(0.2)
    assert found.kl.interval.low == pytest.approx(0.2)  # every question costs the same
    assert (found.top1.value, found.flips.value) == (0.875, 0.25)
    assert found.flips.interval.low < 0.25 < found.flips.interval.high
    assert (found.accuracy.value, found.gained.value) == (0, -1)


def test_without_known_answers_there_is_no_accuracy():
    free = measured(0.1) | {"right": [None] * COUNT}
    assert figures(free, free, range(COUNT)).accuracy is None


def test_the_trimmed_mean_leaves_out_the_worst_hundredth():
    assert trimmed(np.array([1.0] * 198 + [500.0, 900.0])) == 1
    assert trimmed(np.arange(100.0)) == pytest.approx(np.arange(99.0).mean())


def test_a_ratio_is_paired():
    """What makes questions differ cancels out where one scheme costs exactly half of the other."""
    rng = np.random.default_rng(0)
    hard = [[float(v)] for v in rng.exponential(size=COUNT)]
    half = [[v / 2 for v in part] for part in hard]
    found = ratio({"kl": half}, {"kl": hard}, range(COUNT))
    assert (found.value, found.interval.low, found.interval.high) == pytest.approx((0.5, 0.5, 0.5))
    other = ratio({"kl": [[v] for v in rng.exponential(size=COUNT)]}, {"kl": hard}, range(COUNT))
    assert other.interval.low < 1 < other.interval.high


def test_gates_lie_beyond_what_few_questions_reach():
    """Of 100 questions one costs 100 nats: 36 drawn hold it twice at most nineteen times in twenty."""
    rare = {"kl": [[100.0 * (n == 0)] for n in range(100)], "agree": [[int(n > 0)] for n in range(100)]}
    kl, top1 = ends_of_a_check(rare)
    assert kl == pytest.approx(2 * 100 / 36)
    assert top1 == pytest.approx(34 / 36)
    assert ends_of_a_check(measured(0.1))[0] == pytest.approx(0.2)


def test_questions_of_one_picture_are_drawn_together():
    values = [[float(n // 2 % 2)] for n in range(2 * COUNT)]
    alone = figures(*[{"kl": values, "agree": [[1]] * 80, "right": [None] * 80}] * 2, range(2 * COUNT))
    pairs = figures(
        *[{"kl": values, "agree": [[1]] * 80, "right": [None] * 80}] * 2, [n // 2 for n in range(2 * COUNT)]
    )
    width = [f.kl.interval.high - f.kl.interval.low for f in (alone, pairs)]
    assert width[1] > 1.2 * width[0]


def test_a_difference_inside_its_interval_is_none():
    assert factor(Figure(0.9, Interval(0.8, 1.1, 0.95))) == "none [0.8, 1.1]"
    assert factor(Figure(0.5, Interval(0.4, 0.6, 0.95))) == "0.5 [0.4, 0.6]"
    assert difference(Figure(-0.01, Interval(-0.02, 0.0, 0.95))).startswith("none")
    assert difference(Figure(-0.02, Interval(-0.03, -0.01, 0.95))) == "-2.0 [-3.0, -1.0]"


def test_verdicts():
    spread = Figure(0.3, Interval(0.2, 0.4, 0.95))
    assert [verdict(spread, limit) for limit in (0.1, 0.25, 0.35, 0.5)] == [
        "missed",
        "missed, within the interval",
        "met, within the interval",
        "met",
    ]
    assert verdict(spread, 0.1, at_most=False) == "met"


def gates_of(name: str) -> str:
    gates = load_recipe(name).gates
    return f"{gates.quantizer_max_kl_nats:g}, {gates.quantizer_min_top1:.1%}"


def test_tables_hold_every_scheme_and_compare_with_the_better_mode():
    asked = {
        "has_pictures": True,
        "clusters": list(range(COUNT)),
        "answers": [[1, 2]] * COUNT,
        "right": measured(0.0)["right"],
    }
    score = {
        "with_pictures": {"kl_mean_nats": 0.019, "top1_agreement": 0.9},
        "text_alone": {"kl_mean_nats": 0.5, "top1_agreement": 0.5},
    }
    schemes = {
        "int4": {"score": score, "sets": {"text": measured(0.01)}},
        "ONNX Runtime RTN, symmetric": {"score": None, "sets": {"text": measured(0.04)}},
        "ONNX Runtime RTN, asymmetric": {"score": None, "sets": {"text": measured(0.02)}},
    }
    assert better({n: s["sets"]["text"] for n, s in schemes.items()}, ("int4", "missing")) == "int4"
    shown = tables({"real": {"sets": {"text": asked}, "schemes": schemes}})
    assert "**real, text**: 40 pictures, 40 questions, 80 tokens" in shown
    assert "| int4 | 0.02 [0.02, 0.02] |" in shown
    assert "0.019, 90.0% |" in shown
    assert "| KL beside | ONNX Runtime (ONNX Runtime RTN, asymmetric) |" in shown
    assert "| int4 | 0.5 [0.5, 0.5] |" in shown
    assert f"| int4 | {gates_of('int4')} | 0.02, " in shown
    assert "int4: <= 0.3x ONNX Runtime RTN, asymmetric | 0.5 [0.5, 0.5] | missed |" in shown


def test_prompts_are_many_and_none_twice():
    entries = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    kinds = Counter(entry["kind"] for entry in entries)
    assert set(kinds) == {"knowledge", "instruction", "code", "language", "hard"}
    assert min(kinds.values()) >= 60
    assert len({entry["prompt"] for entry in entries}) == len(entries) >= 300
    assert sum("known" in entry for entry in entries) >= 80


def test_pictures_are_not_those_that_calibrate():
    count = load_recipe("int4").calibration.num_samples
    assert not set(range(FIRST_SEED, FIRST_SEED + PICTURES)) & set(
        range(CALIBRATION_SEED, CALIBRATION_SEED + count)
    )


def test_known_answers_are_words_of_their_own():
    assert names_one("It is H2O, of course.", ["H2O"])
    assert names_one("The capital is paris", ["Paris"])
    assert not names_one("There are a million.", ["lion"])


@pytest.fixture(scope="module")
def demo():
    return open_checkpoint(DEMO)


def coarse(weight: Weight) -> Weight:
    """A weight in steps of its largest value."""
    values = weight.array()
    step = np.abs(values).max()
    return computed(values.shape, "float32", lambda: np.round(values / step) * step)


def test_a_model_is_judged_as_sessions_would(demo):
    """Token by token and answer by answer what a session with a KV cache says, one question at a time."""
    found = pictures("demo", True, 5, 1)
    asked = replace(found, questions=found.questions[1:])  # not about the first picture
    floats = fold(demo.weights)
    model = load(demo, floats)
    run = read_again(model, answered(demo, model, prepare(demo, asked), asked.max_tokens))
    same = judge(demo, asked, run, model)
    assert max(map(max, same["kl"])) < 1e-6
    assert all(map(all, same["agree"]))

    other = {name: coarse(w) if ".layers." in name and len(w.shape) == 2 else w for name, w in floats.items()}
    judged = judge(demo, asked, run, load(demo, other))
    sessions = [TorchSession(load_model(demo.config, w, folded=True), 512) for w in (floats, other)]
    for n, question in enumerate(asked.questions):
        message = user_message(question.text, [asked.pictures[question.picture]])
        prompt = build_prompt([message], demo.prompt.format, demo.tokenizer, demo.pictures.image)
        said = run.answers[n].tolist()
        seen = [embed_prompt(s, prompt, [s.encode_image(prompt.images[0])]) for s in sessions]
        logits = [teacher_forced(s, embeds, said) for s, embeds in zip(sessions, seen, strict=True)]
        expected = metrics.kl_divergence(*logits)
        np.testing.assert_allclose(judged["kl"][n], expected, rtol=2e-3, atol=1e-6)
        own = generate(sessions[1], prompt, demo.eos_token_ids, asked.max_tokens).token_ids
        assert judged["right"][n] == asked.is_right(demo.tokenizer.decode(list(own)).strip(), question.known)
    assert not all(map(all, judged["agree"]))


def test_text_alone_and_what_is_right(demo):
    found = pictures("demo", False, 1, 2)
    alone = tuple(
        replace(q, picture=None, known=known) for q, known in zip(found.questions, [("?",), ()], strict=True)
    )
    text = QuestionSet((), alone, found.is_right, 8)
    model = load(demo, fold(demo.weights))
    run = read_again(model, answered(demo, model, prepare(demo, text), 8))
    assert right_answers(demo, text, run.answers) == [0, None]
    assert judge(demo, text, run, model)["entropy"] > 0
