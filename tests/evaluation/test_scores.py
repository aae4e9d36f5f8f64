"""Scores against what the publishers' own scripts compute."""

import pytest

from fastvlm_convert.evaluation.scores import (
    anls,
    edit_distance,
    exact_match,
    normalized,
    scores_of,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("a man and an apple", "man and apple"),
        ("two", "2"),
        ("Ten cats", "10 cats"),
        ("none", "0"),
        ("zero", "0"),
        ("twenty", "twenty"),
        ("dont know", "don't know"),
        ("it isnt", "it isn't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("yall'd've", "y'all'd've"),
        ("oclock", "o'clock"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("1,000", "1000"),
        ("1,000 (approx.)", "1000 approx"),
        ("black & white", "black & white"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("x-ray", "x ray"),
        ("red-and-blue", "red and blue"),
        ("yes!", "yes"),
        ("what?", "what"),
        ('"stop"', "stop"),
        ("hello, world", "hello world"),
        ("a.m.", "am"),
        ("10:30", "10:30"),
        ("don't", "don't"),
        ("it's", "it's"),
        ("[north]", "north"),
        ("50%", "50%"),
        ("#1", "#1"),
        ("e-mail @ home", "e mail home"),
        ("A", ""),
        ("the", ""),
        ("Im", "im"),
        ("let's", "let's"),
        ("\tred\ngreen ", "red green"),
        ("who've", "who've"),
        ("mr. t", "mr t"),
        ("$2.50", "$2.50"),
        ("no,", "no"),
    ],
)
def test_texts_are_normalized_as_the_published_script_does_it(text, expected):
    """Computed by vqaEval.py of github.com/GT-Vision-Lab/VQA at a013f00."""
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("response", "answers", "expected"),
    [
        ("red", ["red"] * 10, 1.0),
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9),
        ("red", ["red"] * 2 + ["blue"] * 8, 0.6),
        ("Red.", ["red"] + ["blue"] * 9, 0.3),
        ("green", ["red"] * 9 + ["blue"], 0.0),
        ("two", ["2"] * 4 + ["3"] * 6, 1.0),
        ("red", ["red"] * 3 + ["the blue one"], 0.75),
        ("yes", ["yes"] * 4 + ["no"] * 2, 1.0),
    ],
)
def test_vqa_accuracy_is_that_of_the_published_script(response, answers, expected):
    assert vqa_accuracy(response, answers) == pytest.approx(expected)


def test_unanimous_annotators_are_compared_after_normalization_too():
    """The published script forgets that; its site does not."""
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 1


def test_three_annotators_are_too_few_for_vqa_accuracy():
    assert vqa_accuracy("red", ["red"] * 3) is None
    assert vqa_accuracy("red", ["red"] * 4) == 1


@pytest.mark.parametrize(
    ("response", "answers", "expected"),
    [
        ("1/8/93", ["1/8/93"], 1.0),
        ("Edward  SHANNON", ["edward shannon", "x"], 1.0),  # but the length is that of the text as given
        ("edward shanon", ["Edward Shannon"], 1 - 1 / 14),
        ("coca cola", ["Coca-Cola Company", "coca-cola"], 1 - 1 / 9),
        ("abcd", ["abxy"], 0.5),  # exactly a half counts
        ("abc", ["axy"], 0.0),
        ("", ["x"], 0.0),
        ("The invoice says that it is 4", ["4"], 0.0),
    ],
)
def test_anls_is_that_of_the_competition(response, answers, expected):
    assert anls(response, answers) == pytest.approx(expected)


def test_white_space_counts_in_the_length_alone():
    """As in the script: the distance is of the texts without it, the length of the texts as given."""
    assert anls("a" * 8 + "   b", ["a" * 8 + " c"]) == pytest.approx(1 - 1 / 12)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("same", "same", 0), ("flaw", "lawn", 2)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_exact_match_ignores_case_and_white_space_alone():
    assert exact_match(" The red\nCircle. ", ["a", "the red circle."]) == 1
    assert exact_match("The red circle", ["The red circle."]) == 0
    assert exact_match("", ["x"]) == 0


def test_every_score_at_once():
    assert scores_of("red", ["red"]) == {"exact_match": 1, "vqa_accuracy": None, "anls": 1}
