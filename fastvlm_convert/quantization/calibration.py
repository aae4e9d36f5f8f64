"""Calibration data: images with questions."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastvlm_convert.questions import Question, generated_questions, read_questions
from fastvlm_convert.recipe_settings import CalibrationSettings


@dataclass(frozen=True)
class Calibration:
    """Images with questions.

    Attributes:
        questions: At least one.
        sha256: Hash of their content.
        notes: What the user should know of how they were chosen.
    """

    questions: tuple[Question, ...]
    sha256: str
    notes: tuple[str, ...] = ()


def read_calibration(source: Path | None, settings: CalibrationSettings) -> Calibration:
    """The images of a folder or a .jsonl file, or those of the demo generator.

    Raises:
        ImageError: The source is missing, empty or damaged.
    """
    if source is None:
        found = generated_questions(settings.num_samples)
    else:
        found = read_questions(source, settings.num_samples)
    digest = hashlib.sha256()
    for question in found.questions:
        sizes = [image.size for image in question.images]
        digest.update(repr((sizes, question.text, question.answer)).encode())
        for image in question.images:
            digest.update(image.tobytes())
    return Calibration(found.questions, digest.hexdigest(), found.notes)
