"""Images with questions: to compare models on, and to calibrate with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from fastvlm_convert.demo.samples import calibration_samples, check_samples
from fastvlm_convert.errors import ImageError
from fastvlm_convert.preprocess import load_image

IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DEFAULT_QUESTION: Final = "Describe the image."


@dataclass(frozen=True)
class Question:
    """An image with a question about it.

    Attributes:
        image: RGB.
        text: The question.
        answer: The answer to calibrate with; None asks the reference.
    """

    image: Image.Image
    text: str
    answer: str | None = None


def standard_questions() -> list[Question]:
    """The standard check images of the demo generator, one question each."""
    return [Question(image, question.question) for image, question in check_samples()]


def generated_questions(count: int) -> list[Question]:
    """Images of the demo generator for calibration, one question each."""
    return [Question(image, question.question) for image, question in calibration_samples(count)]


def read_questions(path: Path, at_most: int | None = None) -> list[Question]:
    """The images of a folder or of a JSON Lines file.

    A folder has a `questions.json`, a list of objects with `image`, `question` and optionally `answer`; or
    its images get one default question each. A `.jsonl` file has one such object per line. Images are named
    relative to where they are listed.

    Args:
        path: The folder or file.
        at_most: Entries read, the first ones; None reads all.

    Raises:
        ImageError: There is no such folder or file, it names no pictures, or one cannot be read.
    """
    if path.is_file() and path.suffix == ".jsonl":
        lines = _read_text(path).split("\n")  # not splitlines: JSON strings may hold U+2028
        entries = [_parsed(line, path, f"line {n + 1}: ") for n, line in enumerate(lines) if line.strip()]
        return _questions(entries, path.parent, path, at_most)
    if not path.is_dir():
        missing = "there is no such file" if path.suffix == ".jsonl" else "there is no such folder of images"
        what = "neither a folder of images nor a .jsonl file" if path.exists() else missing
        raise ImageError(what, where=path)
    listing = path / "questions.json"
    if listing.is_file():
        value = _parsed(_read_text(listing), listing)
        if not isinstance(value, list):
            raise ImageError(f"expected a list, each entry {_EXPECTED}", where=listing)
        return _questions(value, path, listing, at_most)
    names = sorted(p.name for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    return _questions([{"image": name, "question": DEFAULT_QUESTION} for name in names], path, path, at_most)


_EXPECTED = "an object with 'image', 'question' and perhaps 'answer'"


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"cannot read: {error}", where=path) from error


def _parsed(text: str, where: Path, place: str = "") -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{place}not valid JSON: {error}", where=where) from error


def _questions(entries: Sequence[Any], folder: Path, where: Path, at_most: int | None) -> list[Question]:
    if not entries:
        expected = f"no images here ({', '.join(IMAGE_SUFFIXES)})" if where.is_dir() else "no entries here"
        raise ImageError(expected, where=where)
    for number, entry in enumerate(entries):
        if not _is_question(entry):
            raise ImageError(f"entry {number + 1}: expected {_EXPECTED}", where=where)
    chosen = entries[:at_most]
    return [Question(load_image(folder / e["image"]), e["question"], e.get("answer")) for e in chosen]


def _is_question(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str) for key in ("image", "question"))
        and isinstance(entry.get("answer"), str | None)
    )
