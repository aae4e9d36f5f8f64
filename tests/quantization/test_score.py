"""The score of the answers, and its file."""

import numpy as np
import pytest

from fastvlm_convert.quantization.score import AnswerScore, answer_score, load_score, save_score


def test_by_hand():
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
    candidate = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]], np.float32))
    expected = (0.5 * np.log(2) + 0.25 * np.log(0.5)) / 2
    assert answer_score([(reference[:1], candidate[:1]), (reference[1:], candidate[1:])], 1) == AnswerScore(
        pytest.approx(expected, rel=1e-5), 0.5, 2, 1
    )


def test_it_is_kept(tmp_path):
    path = tmp_path / "answers.json"
    assert load_score(path) is None
    save_score(path, AnswerScore(1.25e-7, 1.0, 3, 1))
    assert load_score(path) == AnswerScore(1.25e-7, 1.0, 3, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["answers.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"kl_mean_nats": "x"}', "\x00"])
def test_a_damaged_one_is_none(tmp_path, content):
    path = tmp_path / "answers.json"
    path.write_text(content)
    assert load_score(path) is None
