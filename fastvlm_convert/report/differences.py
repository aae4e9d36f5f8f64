"""Two answers side by side, with what differs in each."""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Final

_MAX_WORDS: Final = 2000  # comparing takes the square of it


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: The part.
        differs: Whether the other answer has something else there.
    """

    text: str
    differs: bool


def marked(reference: str, candidate: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Both answers in pieces, words that the other does not have apart.

    Answers of more than 2000 words are compared up to there; the rest differs if it is not equal.
    """
    ours, theirs = _words(reference), _words(candidate)
    matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
    left: list[Piece] = []
    right: list[Piece] = []
    for tag, a, b, c, d in matcher.get_opcodes():
        for pieces, words in ((left, ours[a:b]), (right, theirs[c:d])):
            if words:
                pieces.append(Piece("".join(words), tag != "equal"))
    return _joined(left), _joined(right)


def _joined(pieces: list[Piece]) -> tuple[Piece, ...]:
    """The same with spaces between two differences made part of them: one mark instead of two."""
    found: list[Piece] = []
    for n, piece in enumerate(pieces):
        inside = 0 < n < len(pieces) - 1 and piece.text.isspace()
        differs = piece.differs or (inside and pieces[n - 1].differs and pieces[n + 1].differs)
        if found and found[-1].differs == differs:
            found[-1] = Piece(found[-1].text + piece.text, differs)
        else:
            found.append(Piece(piece.text, differs))
    return tuple(found)


def _words(text: str) -> list[str]:
    """Words and what is between them; joined they are the text."""
    words = re.findall(r"\w+|\s+|[^\w\s]", text)
    rest = "".join(words[_MAX_WORDS:])
    return [*words[:_MAX_WORDS], rest] if rest else words
