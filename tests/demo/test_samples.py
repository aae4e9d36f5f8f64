"""The generated pictures: deterministic, disjoint from training, and as committed."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_convert.demo import KINDS, check_samples, held_out, make_sample
from fastvlm_convert.demo.samples import CHECK_SEED, HELD_OUT_SEED

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "fastvlm-demo"


def test_same_seed_gives_the_same_sample():
    first, second = make_sample(5), make_sample(5)
    assert first.scene == second.scene
    assert first.questions == second.questions
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))


def test_other_seed_gives_another_picture():
    scenes = {make_sample(seed).scene for seed in range(50)}
    assert len(scenes) == 50


def test_held_out_and_check_seeds_lie_beyond_training():
    # Training scene i of run r has seed 10_000_000 r + i, with r < 100.
    assert HELD_OUT_SEED >= 100 * 10_000_000
    assert CHECK_SEED >= HELD_OUT_SEED + 500
    assert held_out(3)[2].scene == make_sample(HELD_OUT_SEED + 2).scene


def test_every_kind_occurs():
    kinds = {question.kind for sample in held_out(30) for question in sample.questions}
    assert kinds == set(KINDS)
    assert len(KINDS) >= 8


def test_pictures_come_in_all_formats():
    assert {sample.scene.format for sample in held_out(30)} == {"square", "wide", "tall"}
    assert all(sample.image.size == (sample.scene.width, sample.scene.height) for sample in held_out(30))


def test_check_pictures_cover_kinds_and_formats():
    samples = check_samples()
    assert len(samples) == 16
    assert {question.kind for _, question in samples} == set(KINDS)
    assert len({image.size for image, _ in samples}) == 16
    assert len({np.sign(image.width - image.height) for image, _ in samples}) == 3


@cache
def generated():
    return check_samples()


@pytest.mark.parametrize("index", range(16))
def test_committed_check_picture_is_the_generated_one(index):
    image, question = generated()[index]
    entry = json.loads((CHECKPOINT / "check_images" / "questions.json").read_text())[index]
    assert entry == {
        "image": f"{index:02d}.png",
        "question": question.question,
        "answer": question.answer,
    }
    with Image.open(CHECKPOINT / "check_images" / entry["image"]) as stored:
        assert np.array_equal(np.asarray(stored), np.asarray(image))
