"""The tokenizer, and the packing of several questions about one picture into one row.

A row is `system prompt | image tokens | question 1 answer 1 | question 2 answer 2 | ...`. Every
question sees only the prefix and itself, at the positions it would have alone, so one pass
through the decoder trains them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from style import DEMO, Style
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from fastvlm_convert.demo.draw import Draw
from fastvlm_convert.demo.questions import Question

END_OF_TEXT, START, END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SYSTEM = "You are a helpful assistant."
NUM_IMAGE_TOKENS = 16
ROW_LENGTH = 160
IGNORE = -1
REPEAT = "repeat"  # trains the embeddings of characters and fragments that no answer needs

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRINTABLE = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a"]  # space, newline


def train_tokenizer(num_scenes: int = 3000, seed: int = 0, style: Style = DEMO) -> Tokenizer:
    """Learn byte-level merges until every word of questions and answers is one token.

    Words on signs are left out, so signs are read letter by letter.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=1, initial_alphabet=_PRINTABLE, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(num_scenes, seed, style), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _corpus(num_scenes: int, seed: int, style: Style) -> Iterator[str]:
    yield from (f"system\n{SYSTEM}", "user\n", "assistant\n", "Repeat:")
    draw = Draw(seed)
    for _ in range(num_scenes):
        scene = style.make(draw)
        spelled = style.spelled(scene)
        for question in style.ask_all(scene, draw):
            yield question.question
            yield " ".join(w for w in question.answer.split(" ") if w.strip(".") not in spelled)


@dataclass(frozen=True)
class Row:
    """One packed row: ids, targets (IGNORE where nothing is asked), segments, positions.

    Image tokens have id 0; `segment` is 0 in the prefix and counts the questions from 1.
    """

    ids: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


class Packer:
    """Turns questions into rows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Encode the parts that never change."""
        self.tokenizer = tokenizer
        start, end = (tokenizer.token_to_id(token) for token in (START, END))
        newline = self.encode("\n")
        self.system = (
            *(start, *self.encode(f"system\n{SYSTEM}"), end, *newline),
            *(start, *self.encode("user\n")),
        )
        self._answer_start = (end, *newline, start, *self.encode("assistant\n"))
        # Comes after the last word of a conversation, as in pre-training texts.
        self._end = (end, tokenizer.token_to_id(END_OF_TEXT))
        self.prefix_length = len(self.system) + NUM_IMAGE_TOKENS

    @lru_cache(maxsize=50_000)  # noqa: B019 - one packer lives as long as the training
    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text."""
        return tuple(self.tokenizer.encode(text).ids)

    def segment(self, question: Question) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids before the answer and of the answer, both end tokens included."""
        prompt = self.encode("\n" + question.question) + self._answer_start
        return prompt, self.encode(question.answer) + self._end

    def pack(self, questions: Iterable[Question]) -> tuple[Row, list[Question]]:
        """Fill one row; return it with the questions that did not fit."""
        ids = np.zeros(ROW_LENGTH, np.int64)
        targets = np.full(ROW_LENGTH, IGNORE, np.int64)
        segments = np.full(ROW_LENGTH, IGNORE, np.int64)
        positions = np.zeros(ROW_LENGTH, np.int64)
        used = self.prefix_length
        ids[: len(self.system)] = self.system
        segments[:used] = 0
        positions[:used] = np.arange(used)
        left, index = [], 0
        for question in questions:
            prompt, answer = self.segment(question)
            length = len(prompt) + len(answer) - 1  # <|endoftext|> is only a target
            if used + length > ROW_LENGTH:
                left.append(question)
                continue
            index += 1
            span = slice(used, used + length)
            ids[span] = (prompt + answer)[:-1]
            targets[used + len(prompt) - 1 : used + length] = answer
            segments[span] = index
            positions[span] = np.arange(self.prefix_length, self.prefix_length + length)
            used += length
        return Row(ids, targets, segments, positions), left


class QuestionSource:
    """Endless training questions about a scene, in random order."""

    def __init__(self, tokenizer: Tokenizer, style: Style = DEMO) -> None:
        """Find the text of every token."""
        self._style = style
        self._kinds = [kind for kind in style.kinds for _ in range(style.shares.get(kind, 1))]
        vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=False).values())
        self._pieces = [tokenizer.decode([token]) for token in vocabulary]

    def draw(self, scene: Any, draw: Draw, count: int = 9) -> list[Question]:  # noqa: ANN401
        """About `count` questions of random kinds, none of them twice."""
        questions: dict[str, Question] = {}
        for kind in draw.sample(self._kinds, min(count, len(self._kinds))):
            question = self._style.ask(scene, kind, draw)
            if question is not None:
                questions[question.question] = question
        listed = list(questions.values())
        if draw.chance(0.15):
            listed.insert(0, self._repeat(draw))
        return listed

    def _repeat(self, draw: Draw) -> Question:
        pieces = [draw.pick(self._pieces) for _ in range(1 + draw.index(4))]
        text = "".join(piece + draw.pick("#&~|") for piece in pieces)
        return Question(REPEAT, f"Repeat: {text}", text)
