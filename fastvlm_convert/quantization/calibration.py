"""Calibration data: images with questions."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastvlm_convert.questions import Question, generated_questions, read_questions
from fastvlm_convert.recipe import CalibrationSettings


@dataclass(frozen=True)
class Calibration:
    """Images with questions.

    Attributes:
        questions: At least one.
        sha256: Hash of their content.
    """

    questions: tuple[Question, ...]
    sha256: str


def read_calibration(source: Path | None, settings: CalibrationSettings) -> Calibration:
    """The images of a folder or a .jsonl file, or those of the demo generator.

    Raises:
        ImageError: The source is missing, empty or damaged.
    """
    if source is None:
        questions = generated_questions(settings.num_samples)
    else:
        questions = read_questions(source, settings.num_samples)
    digest = hashlib.sha256()
    for question in questions:
        digest.update(repr((question.image.size, question.text, question.answer)).encode())
        digest.update(question.image.tobytes())
    return Calibration(tuple(questions), digest.hexdigest())
