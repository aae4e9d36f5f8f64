"""Calibration data: questions, most of them about images."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastvlm_convert.checkpoint.tokenizer import TextTokenizer
from fastvlm_convert.errors import TokenizerError
from fastvlm_convert.prompt import Text
from fastvlm_convert.questions import Question, mixed_questions, read_questions
from fastvlm_convert.recipe_settings import CalibrationSettings


@dataclass(frozen=True)
class Calibration:
    """Questions.

    Attributes:
        questions: At least one.
        sha256: Hash of their content.
        notes: What the user should know of how they were chosen.
    """

    questions: tuple[Question, ...]
    sha256: str
    notes: tuple[str, ...] = ()


def read_calibration(
    source: Path | None, settings: CalibrationSettings, tokenizer: TextTokenizer
) -> Calibration:
    """The questions of a folder or a .jsonl file, or the mix that calibrates by default.

    Args:
        source: The folder or file; None takes the mix.
        settings: How many questions.
        tokenizer: The checkpoint's. Of the mix's texts those are taken whose characters it has.

    Raises:
        ImageError: The source is missing, empty or damaged.
    """
    if source is None:
        found = mixed_questions(settings.num_samples, lambda text: _is_expressible(text, tokenizer))
    else:
        found = read_questions(source, settings.num_samples)
    digest = hashlib.sha256()
    for question in found.questions:
        sizes = [image.size for image in question.images]
        digest.update(repr((sizes, question.text, question.answer)).encode())
        for image in question.images:
            digest.update(image.tobytes())
    return Calibration(found.questions, digest.hexdigest(), found.notes)


def _is_expressible(text: str, tokenizer: TextTokenizer) -> bool:
    try:
        tokenizer.encode_texts([Text(text)])
    except TokenizerError:
        return False
    return True
