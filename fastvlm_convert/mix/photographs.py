"""Photographs under CC0 or in the public domain (`photos/PROVENANCE.md`), cropped and varied by a seed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from fastvlm_convert.demo.draw import Draw

FOLDER: Final = Path(__file__).parent / "photos"

# In the order in which they take turns: those with a subject stand between textures.
SUBJECTS: Final = {
    "chelsea": ("What animal is this?", "What color are the eyes?"),
    "brick": ("What is this surface made of?", "Is the wall old or new?"),
    "coffee": ("What is in the cup?", "What is the table made of?"),
    "grass": ("What grows here?", "Where could this be?"),
    "astronaut": ("What is the person wearing?", "What is in the background?"),
    "camera": ("What is the man doing?", "What is behind the man?"),
    "gravel": ("What covers the ground?", "How large are the stones?"),
    "retina": ("What does this medical picture show?", "Which colors dominate?"),
    "clock_motion": ("Why is this picture blurred?", "What is the round object?"),
}
NAMES: Final = tuple(SUBJECTS)
QUESTIONS: Final = (
    "Describe the image.",
    "Describe this picture in detail.",
    "Write a short caption.",
    "What is the most striking thing in this picture?",
    "Is there any text in the picture?",
    "List what you can see.",
)
_SHAPES: Final = (1.0, 4 / 3, 3 / 4, 16 / 9)  # width by height of a crop


def photograph(name: str, draw: Draw) -> tuple[Image.Image, str]:
    """A crop of a photograph, perhaps mirrored, with other light; and a question about it."""
    whole = _opened(name)
    shape, share = draw.pick(_SHAPES), draw.uniform(0.55, 1.0)
    width = share * min(whole.width, whole.height * shape)
    height = width / shape
    left = draw.uniform(0, whole.width - width)
    top = draw.uniform(0, whole.height - height)
    picture = whole.crop((round(left), round(top), round(left + width), round(top + height)))
    if draw.chance(0.5):
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = _relit(picture, draw.uniform(0.75, 1.3), [draw.uniform(0.92, 1.08) for _ in range(3)])
    return picture, draw.pick((*SUBJECTS[name], *QUESTIONS))


def _relit(picture: Image.Image, gamma: float, gains: list[float]) -> Image.Image:
    """Other exposure (`255 (v / 255)^gamma`) and white balance."""
    values = 255 * (np.asarray(picture, np.float64) / 255) ** gamma * np.array(gains)
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


@cache
def _opened(name: str) -> Image.Image:
    with Image.open(FOLDER / f"{name}.jpg") as image:
        return image.convert("RGB")
