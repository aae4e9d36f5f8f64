"""Answers to one question side by side: the checkpoint's, and what bundles say instead."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fastvlm_convert.report.differences import Piece, marked
from fastvlm_convert.report.sources.verification import Answer
from fastvlm_convert.report.texts import target_name

MAX_SHOWN: Final = 60  # questions; more are counted


@dataclass(frozen=True)
class Variant:
    """An answer that differs from the checkpoint's.

    Attributes:
        by: Who gives it.
        reference: The checkpoint's answer, in pieces.
        answer: This one.
        first_difference: Place of the first token that differs, or None.
        max_kl: Largest divergence of a token in nats, or None where it was not measured.
    """

    by: str
    reference: tuple[Piece, ...]
    answer: tuple[Piece, ...]
    first_difference: int | None
    max_kl: float | None


@dataclass(frozen=True)
class Question:
    """One question with its answers.

    Attributes:
        picture: Label of its picture, or None.
        text: The question.
        reference: The checkpoint's answer.
        same: Who answers the same.
        variants: Answers that differ.
        max_kl: Largest divergence of a token in nats, over all; None where it was not measured.
    """

    picture: str | None
    text: str
    reference: str
    same: tuple[str, ...]
    variants: tuple[Variant, ...]
    max_kl: float | None


def by_question(answers: Sequence[Answer]) -> tuple[Question, ...]:
    """Answers by question: those that differ first, then those that are closest to it."""
    groups: dict[tuple[str | None, str, str], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.picture, answer.question, answer.reference_text), []).append(answer)
    questions = [_question(*key, group) for key, group in groups.items()]
    return tuple(sorted(questions, key=lambda q: (not q.variants, -(q.max_kl or 0.0))))


def _question(picture: str | None, text: str, reference: str, answers: Sequence[Answer]) -> Question:
    same = [_by(answer) for answer in answers if answer.bundle_text == reference]
    variants = []
    for answer in answers:
        if answer.bundle_text != reference:
            left, right = marked(reference, answer.bundle_text)
            variants.append(Variant(_by(answer), left, right, answer.first_difference, _largest(answer)))
    largest = max((kl for answer in answers if (kl := _largest(answer)) is not None), default=None)
    return Question(picture, text, reference, tuple(dict.fromkeys(same)), tuple(variants), largest)


def _by(answer: Answer) -> str:
    return f"{target_name(answer.target)}, {answer.executed_by}"


def _largest(answer: Answer) -> float | None:
    return max(answer.kl_nats, default=None)
