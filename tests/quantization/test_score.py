"""The score of the answers, and its file."""

import numpy as np
import pytest

from fastvlm_convert.quantization.score import (
    Agreement,
    AnswerScore,
    answer_score,
    load_score,
    save_score,
)

REFERENCE = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]], np.float32))
CANDIDATE = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]], np.float32))
LOST = 0.5 * np.log(2) + 0.25 * np.log(0.5)  # by the first token; the others lose nothing


def test_by_hand():
    parts = [(REFERENCE[:1], CANDIDATE[:1]), (REFERENCE[1:], CANDIDATE[1:])]
    found = answer_score(parts, np.array([4, 4, 7]), np.array([True, True, False]), True)
    assert found.is_held_out
    assert found.total == Agreement(pytest.approx(LOST / 3, rel=1e-5), pytest.approx(2 / 3), 3, 2)
    assert found.with_pictures == Agreement(pytest.approx(LOST / 2, rel=1e-5), 0.5, 2, 1)
    assert found.text_alone == Agreement(pytest.approx(0, abs=1e-6), 1.0, 1, 1)


@pytest.mark.parametrize("shown", [True, False])
def test_of_a_kind_that_is_not_there_nothing_is_said(shown):
    found = answer_score([(REFERENCE, CANDIDATE)], np.zeros(3, int), np.full(3, shown), False)
    there, missing = (found.with_pictures, found.text_alone)[:: 1 if shown else -1]
    assert (there, missing, found.is_held_out) == (found.total, None, False)


def test_it_is_kept(tmp_path):
    path, total = tmp_path / "answers.json", Agreement(1.25e-7, 1.0, 3, 1)
    assert load_score(path) is None
    for score in (AnswerScore(total, True, total, None), AnswerScore(total, False, None, total)):
        save_score(path, score)
        assert load_score(path) == score
    assert [p.name for p in tmp_path.iterdir()] == ["answers.json"]


DAMAGED = ["", "{", "[]", "3", "{}", '{"total": null}', '{"total": {"kl_mean_nats": "x"}}', "\x00"]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_one_is_none(tmp_path, content):
    path = tmp_path / "answers.json"
    path.write_text(content)
    assert load_score(path) is None
