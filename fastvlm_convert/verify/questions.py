"""Pictures with questions to compare models on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from fastvlm_convert.demo.samples import check_samples
from fastvlm_convert.errors import ImageError
from fastvlm_convert.preprocess import load_image

IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DEFAULT_QUESTION: Final = "Describe the image."


@dataclass(frozen=True)
class Question:
    """A picture with a question about it."""

    image: Image.Image
    text: str


def standard_questions() -> list[Question]:
    """The standard check pictures of the demo generator, one question each."""
    return [Question(image, question.question) for image, question in check_samples()]


def folder_questions(folder: Path) -> list[Question]:
    """The pictures of a folder, with the questions of its `questions.json` or one default question each.

    Raises:
        ImageError: There is no such folder, it has no pictures, or one cannot be read.
    """
    if not folder.is_dir():
        raise ImageError("there is no such folder of images", where=folder)
    listing = folder / "questions.json"
    if listing.is_file():
        try:
            entries = [(str(e["image"]), str(e["question"])) for e in json.loads(listing.read_text("utf-8"))]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ImageError(
                "expected a list of objects with 'image' and 'question'", where=listing
            ) from error
    else:
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        entries = [(name, DEFAULT_QUESTION) for name in names]
    if not entries:
        raise ImageError(f"no images here ({', '.join(IMAGE_SUFFIXES)})", where=folder)
    return [Question(load_image(folder / name), text) for name, text in entries]
