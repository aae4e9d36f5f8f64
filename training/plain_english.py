"""Scenes in plain English: descriptions, questions beside the generator's, and the words that a cell spells.

A cell of the 2x2 layout covers 2x2 of the 4x4 image tokens. Read row by row, they spell what is in it: color,
shape, size and place; or the plate's kind, its text in pieces, and place.
"""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastvlm_convert.demo.draw import Draw
from fastvlm_convert.demo.questions import Asker, Pair, Question, ask, phrase
from fastvlm_convert.demo.scene import COLORS, PLACES, SHAPES, SIZES, WORDS, Scene, Shape, Sign

_TOKENS_OF_CELL = ((0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15))
_LONG, _SHORT = ("description", "shows", "see"), ("size", "colors", "is_color", "names")
# Every row has one description; looking a thing up by its name is asked more often than the rest.
_KINDS = (
    *("color", "color", "color_at", "content", "content", "position", "position", "count", "exists"),
    *("comparison", "relation", "word", "word", "number", "number", "format", *_SHORT),
)


def _listing(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _shows(scene: Scene, draw: Draw) -> Pair | None:
    parts = [f"{phrase(t)} at the {p}" for p, t in zip(PLACES, scene.cells, strict=True) if t is not None]
    question = draw.pick(("What is in this picture?", "What does the picture show?"))
    return question, f"The picture shows {_listing(parts)}."


def _see(scene: Scene, draw: Draw) -> Pair | None:
    parts = [phrase(thing) for thing in scene.cells if thing is not None]
    return draw.pick(("What do you see?", "What can you see in the image?")), f"I see {_listing(parts)}."


def _size(scene: Scene, draw: Draw) -> Pair | None:
    if not scene.shapes:
        return None
    shape = draw.pick(list(scene.shapes.values()))
    question = draw.pick(("How big is the {}?", "Is the {} large or small?"))
    return question.format(shape.name), f"The {shape.name} is {shape.size}."


def _colors(scene: Scene, draw: Draw) -> Pair | None:
    found = list(dict.fromkeys(shape.color for shape in scene.shapes.values()))
    if not found:
        return None
    question = draw.pick(("Which colors do the shapes have?", "What colors are the shapes?"))
    return question, f"{_listing(found).capitalize()}."


def _is_color(scene: Scene, draw: Draw) -> Pair | None:
    if not scene.shapes:
        return None
    shape = draw.pick(list(scene.shapes.values()))
    color = shape.color if draw.chance(0.5) else draw.pick([c for c in COLORS if c != shape.color])
    right = "Yes" if color == shape.color else "No"
    return f"Is the {shape.name} {color}?", f"{right}, the {shape.name} is {shape.color}."


def _names(scene: Scene, draw: Draw) -> Pair | None:
    names = [f"a {shape.name}" for shape in scene.shapes.values()]
    if not names:
        return None
    question = draw.pick(("Name the shapes.", "Which shapes are there?"))
    return question, f"There is {_listing(names)}."


ASKERS: dict[str, Asker] = {
    "shows": _shows, "see": _see, "size": _size, "colors": _colors, "is_color": _is_color, "names": _names,
}  # fmt: skip


def questions(scene: Scene, draw: Draw) -> list[Question]:
    """A description and up to ten questions about a scene, none of them twice."""
    found: dict[str, Question] = {}
    for kind in (draw.pick(_LONG), *draw.sample(_KINDS, 10)):
        question = _asked(scene, kind, draw)
        if question is not None:
            found[question.question] = question
    listed = list(found.values())
    return draw.sample(listed, len(listed))


def _asked(scene: Scene, kind: str, draw: Draw) -> Question | None:
    if kind not in ASKERS:
        return ask(scene, kind, draw)
    pair = ASKERS[kind](scene, draw)
    return None if pair is None else Question(kind, *pair)


class Spelling:
    """What the image tokens of a scene spell, as rows of a table of word embeddings."""

    def __init__(self, tokenizer: Tokenizer, table: Tensor) -> None:
        """Find the embeddings of all words; `table` is the language model's (V, D)."""
        signs = [piece for word in WORDS for piece in _sign_pieces(tokenizer, word)]
        words = ("nothing", "empty", "sign", "number", *COLORS, *SHAPES, *SIZES, *PLACES)
        pieces = [tuple(tokenizer.encode(f" {word}", add_special_tokens=False).ids) for word in words]
        digits = [(tokenizer.token_to_id(digit),) for digit in "0123456789"]
        self._rows = {piece: n for n, piece in enumerate(dict.fromkeys((*pieces, *signs, *digits)))}
        self._word = dict(zip(words, pieces, strict=True))
        self._tokenizer = tokenizer
        self.rows = torch.stack([table[list(piece)].mean(0) for piece in self._rows])

    def labels(self, scene: Scene) -> np.ndarray:
        """The row of every image token, int64 [16]."""
        found = np.zeros(16, np.int64)
        for place, (tokens, thing) in enumerate(zip(_TOKENS_OF_CELL, scene.cells, strict=True)):
            spelled = (*self._spelled(thing), self._word[PLACES[place]])
            found[list(tokens)] = [self._rows[piece] for piece in spelled]
        return found

    def _spelled(self, thing: Shape | Sign | None) -> tuple[tuple[int, ...], ...]:
        if thing is None:
            return self._word["nothing"], self._word["nothing"], self._word["empty"]
        if isinstance(thing, Shape):
            return self._word[thing.color], self._word[thing.name], self._word[thing.size]
        if thing.is_number:
            first, second = ((self._tokenizer.token_to_id(digit),) for digit in thing.text)
            return self._word["number"], first, second
        first, second = _sign_pieces(self._tokenizer, thing.text)
        return self._word["sign"], first, second


def _sign_pieces(tokenizer: Tokenizer, word: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first token of a word on a sign and the rest of them; the word twice if it is one token."""
    ids = tuple(tokenizer.encode(f" {word}", add_special_tokens=False).ids)
    return ids[:1], ids[1:] or ids
