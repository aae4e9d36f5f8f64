"""The committed tokenizer fits the texts it was made for."""

import pytest

from fastvlm_convert.checkpoint.tokenizer import read_tokenizer
from fastvlm_convert.demo import make_sample
from tests.demo.test_samples import CHECKPOINT


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(CHECKPOINT)


def test_vocabulary_covers_questions_and_answers(tokenizer):
    for seed in range(100):
        for question in make_sample(seed).questions:
            for text in (question.question, question.answer):
                assert tokenizer.decode(tokenizer.encode(text)) == text


def test_descriptions_have_20_to_60_tokens(tokenizer):
    lengths = [
        len(tokenizer.encode(question.answer))
        for seed in range(200)
        for question in make_sample(seed).questions
        if question.kind == "description"
    ]
    assert min(lengths) >= 20
    assert max(lengths) <= 60


def test_signs_are_read_letter_by_letter(tokenizer):
    assert len(tokenizer.encode(" STOP")) == 5
