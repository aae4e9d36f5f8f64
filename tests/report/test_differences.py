"""What differs between two answers, word by word."""

import pytest

from fastvlm_convert.report.differences import marked


def text(pieces) -> str:
    return "".join(f"[{piece.text}]" if piece.differs else piece.text for piece in pieces)


@pytest.mark.parametrize(
    ("one", "other", "left", "right"),
    [
        ("The star is red.", "The star is blue.", "The star is [red].", "The star is [blue]."),
        ("a b", "a b", "a b", "a b"),
        ("one two three", "four five six", "[one two three]", "[four five six]"),
        ("Yes.", "Yes. It is.", "Yes.", "Yes.[ It is.]"),
        ("", "x", "", "[x]"),
        ("\u661f", "\u6708", "[\u661f]", "[\u6708]"),
    ],
)
def test_words(one, other, left, right):
    a, b = marked(one, other)
    assert (text(a), text(b)) == (left, right)


def test_nothing_is_lost_of_long_answers():
    one, other = " ".join(map(str, range(3000))), " ".join(map(str, range(3001)))
    for pieces, whole in zip(marked(one, other), (one, other), strict=True):
        assert "".join(piece.text for piece in pieces) == whole
