"""Pieces of text, of tokens that are parts of characters."""

from collections.abc import Generator

import pytest

from fastvlm_convert.answer_stream import AnswerStream
from fastvlm_convert.generate import Answer, Timings

TIMINGS = Timings(0, 0, 0, 0, 1, 1)


def decode(ids: list[int]) -> str:
    """Tokens are bytes."""
    return bytes(ids).decode(errors="replace")


def tokens(text: bytes) -> Generator[int, None, Answer]:
    yield from text
    return Answer(tuple(text), True, TIMINGS)


def test_a_character_comes_whole():
    stream = AnswerStream(tokens("aé€b".encode()), decode)
    assert list(stream) == ["a", "é", "€", "b"]
    assert stream.text == "aé€b"
    assert stream.answer == Answer(tuple("aé€b".encode()), True, TIMINGS)


def test_half_a_character_at_the_end_is_shown_as_such():
    stream = AnswerStream(tokens("aé".encode()[:-1]), decode)
    assert next(stream) == "a"
    assert stream.answer is None
    assert list(stream) == ["\ufffd"]
    assert stream.answer is not None


def test_an_empty_answer_has_no_pieces():
    assert list(AnswerStream(tokens(b""), decode)) == []


def test_finish_takes_the_rest():
    stream = AnswerStream(tokens(b"abc"), decode)
    assert next(stream) == "a"
    assert stream.finish().token_ids == tuple(b"abc")
    assert stream.text == "abc"
    with pytest.raises(StopIteration):
        next(stream)
