"""What calibrates by default: its parts in their shares, and nothing of the style that is kept apart."""

import json
import os
import subprocess
import sys
from collections import Counter
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from fastvlm_convert.demo.samples import CALIBRATION_SEED, make_sample
from fastvlm_convert.mix import KINDS, TURNS, mixed_samples
from fastvlm_convert.mix.photographs import NAMES, SUBJECTS
from fastvlm_convert.mix.texts import TEXTS

ROOT = Path(__file__).parents[2]


@cache
def mixed():
    return mixed_samples(70)[:70]


@pytest.mark.parametrize(
    ("count", "shares"),
    [
        (1, {"scene": 1}),
        (7, {"scene": 2, "photograph": 2, "document": 1, "receipt": 1, "text": 1}),
        (64, {"scene": 19, "photograph": 18, "document": 6, "receipt": 6, "screen": 6, "text": 9}),
    ],
)
def test_shares(count, shares):
    found = mixed()[:count]
    assert Counter(sample.kind for sample in found) == shares
    assert set(shares) <= set(KINDS)
    assert all((sample.image is None) == (sample.kind == "text") for sample in found)


def test_fewer_samples_are_the_first_ones():
    for few, many in zip(mixed_samples(9)[:9], mixed(), strict=False):
        assert (few.kind, few.question) == (many.kind, many.question)
        assert few.image is many.image is None or few.image.tobytes() == many.image.tobytes()


def test_what_is_held_out_meets_every_turn():
    """Every tenth sample is kept apart to judge by (tests/quantization/test_answers.py)."""
    assert {TURNS[number % len(TURNS)] for number in range(9, 70, 10)} == set(TURNS)
    assert {sample.kind for sample in mixed()[9::10]} >= {"scene", "photograph", "text"}


def test_every_second_picture_is_badly_taken():
    """Noise of 24 (demo/camera.py) is left between neighbors where a picture is else smooth."""
    scenes = [sample.image for sample in mixed() if sample.kind == "scene"]
    rough = [np.median(np.abs(np.diff(np.asarray(image, np.float32), axis=1))) > 8 for image in scenes]
    assert rough == [n % 2 == 1 for n in range(len(scenes))]


def test_scenes_are_the_generators():
    first = make_sample(CALIBRATION_SEED)
    assert mixed()[0].image.tobytes() == first.image.tobytes()
    assert mixed()[0].question in {q.question for q in first.questions}


def test_every_photograph_and_every_text_takes_its_turn():
    photographs = [s for s in mixed() if s.kind == "photograph"]
    assert len(photographs) >= len(NAMES)
    subject = {question: name for name, questions in SUBJECTS.items() for question in questions}
    for number, sample in enumerate(photographs):
        assert subject.get(sample.question, NAMES[number % len(NAMES)]) == NAMES[number % len(NAMES)]
    texts = [sample.question for sample in mixed() if sample.kind == "text"]
    assert texts == list(TEXTS[: len(texts)])
    assert len(set(TEXTS)) == len(TEXTS) == 120


@pytest.mark.parametrize(("count", "more"), [(1, 0), (8, 12), (64, 96)])
def test_texts_follow_that_have_had_no_turn(count, more):
    found = mixed_samples(count)
    told = [sample.question for sample in found if sample.kind == "text"]
    assert [sample.image for sample in found[count:]] == [None] * more
    assert told == list(TEXTS[: len(told)])
    assert not [s for s in mixed_samples(count, lambda _: False) if s.image is None]


def test_no_picture_and_hardly_a_question_comes_twice():
    pictures = [sample.image.tobytes() for sample in mixed() if sample.image is not None]
    assert len(set(pictures)) == len(pictures) == 60
    assert len({sample.question for sample in mixed()}) > 40


def test_a_tokenizer_without_the_characters_gets_other_texts():
    texts = [s.question for s in mixed_samples(70, str.isascii)[:70] if s.kind == "text"]
    assert len(texts) == 10
    assert all(text.isascii() for text in texts)
    assert all(s.question.isascii() for s in mixed() if s.kind != "text")


def test_where_no_text_can_be_said_scenes_take_their_place():
    found = mixed_samples(14, lambda text: False)
    assert Counter(sample.kind for sample in found)["scene"] == 6
    assert all(sample.image is not None for sample in found)


@pytest.mark.parametrize("index", range(14))
def test_rgb_of_sensible_sizes(index):
    image = mixed()[index].image
    if image is not None:
        assert image.mode == "RGB"
        assert 128 <= min(image.size) <= max(image.size) <= 1100
        assert np.asarray(image).std() > 4  # nothing blank


def test_the_same_in_another_process():
    code = (
        "from fastvlm_convert.mix import mixed_samples; from zlib import crc32;"
        "print([(s.kind, s.question, s.image and crc32(s.image.tobytes())) for s in mixed_samples(7)[:7]])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout.strip()  # fmt: skip
    here = [(s.kind, s.question, s.image and crc32(s.image.tobytes())) for s in mixed()[:7]]
    assert repr(here) == there


class TestTheUnseenStyle:
    """Benchmarks judge by it (training/unseen), so nothing that calibrates may come from it."""

    def test_its_code_is_not_run(self):
        code = (
            "import sys; from fastvlm_convert.mix import mixed_samples; mixed_samples(6);"
            "print(*(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)))"
        )
        files = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout  # fmt: skip
        assert f"{os.sep}mix{os.sep}printed.py" in files
        assert f"{os.sep}training{os.sep}" not in files

    def test_its_questions_are_not_asked(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "training"))
        from style import UNSEEN

        from fastvlm_convert.demo.draw import Draw

        scenes = [(UNSEEN.make(Draw(seed)), Draw(seed)) for seed in range(40)]
        asked = {q.question for scene, draw in scenes for q in UNSEEN.ask_all(scene, draw)}
        assert len(asked) > 50
        assert asked.isdisjoint(sample.question for sample in mixed())


def test_no_text_is_one_that_quality_is_judged_by():
    """Nor hardly another: what a model was calibrated with tells nothing about the rest."""
    lines = (ROOT / "benchmarks" / "quality" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    judged = [json.loads(line)["prompt"] for line in lines]
    assert len(judged) > 300
    for text in TEXTS:
        matcher = SequenceMatcher(b=text)
        for prompt in judged:
            matcher.set_seq1(prompt)
            assert matcher.quick_ratio() < 0.8 or matcher.ratio() < 0.8, (text, prompt)
