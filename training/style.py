"""What a training needs to know of a style of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from labels import FIELDS, token_labels
from PIL import Image
from unseen import board, drawing
from unseen import questions as unseen_questions

from fastvlm_convert.demo import questions as demo_questions
from fastvlm_convert.demo.draw import Draw
from fastvlm_convert.demo.questions import Question
from fastvlm_convert.demo.render import render
from fastvlm_convert.demo.scene import Scene, make_scene


@dataclass(frozen=True)
class Style:
    """Pictures with dense labels and questions; a scene is what a picture shows.

    Attributes:
        make: Draws a scene.
        render: Draws its picture, RGB.
        fields: The dense labels of an image token: field -> values, of which an empty one means "none".
        labels: A scene's labels, int64 [16, fields].
        kinds: The kinds of questions.
        ask: A question of a kind; None where a scene allows none.
        spelled: What answers spell letter by letter, so that no token may hold it.
        shares: How often training asks some kinds, the others once.
    """

    make: Callable[[Draw], Any]
    render: Callable[[Any], Image.Image]
    fields: Mapping[str, Sequence[str]]
    labels: Callable[[Any], np.ndarray]
    kinds: Sequence[str]
    ask: Callable[[Any, str, Draw], Question | None]
    spelled: Callable[[Any], set[str]]
    shares: Mapping[str, int]

    def ask_all(self, scene: Any, draw: Draw) -> list[Question]:  # noqa: ANN401
        """One question of every kind that a scene allows."""
        questions = (self.ask(scene, kind, draw) for kind in self.kinds)
        return [question for question in questions if question is not None]


def _signs(scene: Scene) -> set[str]:
    return {sign.text for sign in (scene.word, scene.number) if sign is not None}


def _words(shown: board.Board) -> set[str]:
    row = shown.row_of("word")
    return set() if row is None else {"".join(shown.strips[row].facts)}


DEMO = Style(
    make_scene,
    render,
    FIELDS,
    token_labels,
    demo_questions.KINDS,
    demo_questions.ask,
    _signs,
    # Looking up a shape by its name is the skill that emerges last, so ask for it more often.
    {"color": 3, "position": 3, "exists": 2, "relation": 3, "comparison": 2, "description": 2},
)
UNSEEN = Style(
    board.make_board,
    drawing.draw_board,
    board.FIELDS,
    board.token_labels,
    unseen_questions.KINDS,
    unseen_questions.ask,
    _words,
    {"content": 2, "find": 2, "above": 2},
)
