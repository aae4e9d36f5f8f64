"""Answers to one question side by side: the checkpoint's, and what bundles say instead."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fastvlm_convert.report.differences import Piece, marked
from fastvlm_convert.report.texts import target_name
from fastvlm_convert.verification.answers import Answer

MAX_SHOWN: Final = 60  # questions; more are counted
_INTEGERS: Final = "weights"  # the target of what the integers alone change


@dataclass(frozen=True)
class Variant:
    """An answer that differs from the checkpoint's.

    Attributes:
        by: Who gives it.
        compared_with: Whose answer it is compared with.
        reference: That answer, in pieces.
        answer: This one.
        first_difference: Place of the first token that differs, or None.
        max_kl: Largest divergence of a token in nats, or None where it was not measured.
    """

    by: str
    compared_with: str
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
    groups: dict[tuple[str | None, str], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.picture, answer.question), []).append(answer)
    is_quantized = any(answer.target == _INTEGERS for answer in answers)
    questions = [_question(group, is_quantized) for group in groups.values()]
    return tuple(sorted(questions, key=lambda q: (not q.variants, -(q.max_kl or 0.0))))


def _question(answers: Sequence[Answer], is_quantized: bool) -> Question:
    same = [_by(answer) for answer in answers if answer.bundle_text == answer.reference_text]
    variants = []
    for answer in answers:
        if answer.bundle_text != answer.reference_text:
            left, right = marked(answer.reference_text, answer.bundle_text)
            # What an export changes is judged against the checkpoint with the same integers.
            against = "checkpoint with these integers" if is_quantized else "checkpoint"
            against = "checkpoint" if answer.target == _INTEGERS else against
            largest = _largest(answer)
            variants.append(Variant(_by(answer), against, left, right, answer.first_difference, largest))
    largest = max((kl for answer in answers if (kl := _largest(answer)) is not None), default=None)
    first = answers[0]
    return Question(
        picture=first.picture,
        text=first.question,
        reference=first.reference_text,
        same=tuple(dict.fromkeys(same)),
        variants=tuple(variants),
        max_kl=largest,
    )


def _by(answer: Answer) -> str:
    return f"{target_name(answer.target)}, {answer.executed_by}"


def _largest(answer: Answer) -> float | None:
    return max((kl for kl in answer.kl_nats if kl is not None), default=None)
