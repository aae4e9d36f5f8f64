"""The samples that calibrate by default, in an order of which every part is as mixed as the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle
from typing import Final

from PIL import Image

from fastvlm_convert.demo.camera import badly_taken
from fastvlm_convert.demo.draw import Draw
from fastvlm_convert.demo.samples import CALIBRATION_SEED, make_sample
from fastvlm_convert.mix.photographs import NAMES, photograph
from fastvlm_convert.mix.printed import document, receipt, screen
from fastvlm_convert.mix.texts import TEXTS

SEED: Final = 4_000_000_000  # beyond those of the demo's scenes
# Every second picture is badly taken: weights that suit clean ones alone are wrong for all others. A third is
# text alone: a real language model's weights are solved with too few words otherwise (docs/quality.md). There
# are nine turns, or seven, so that every tenth sample, which is held out, meets all of them.
TURNS: Final = (
    "scene", "text", "photograph", "printed", "text", "bad scene", "bad photograph", "text", "bad printed",
)  # fmt: skip
PICTURE_TURNS: Final = (
    "scene", "photograph", "printed", "scene", "bad scene", "bad photograph", "bad printed",
)  # fmt: skip
KINDS: Final = ("scene", "photograph", "document", "receipt", "screen", "text")
_PRINTED: Final = {"document": document, "receipt": receipt, "screen": screen}


@dataclass(frozen=True)
class MixedSample:
    """A question, and the picture that it is about.

    Attributes:
        kind: One of `KINDS`.
        image: RGB; None for a question of text alone.
        question: The text.
    """

    kind: str
    image: Image.Image | None
    question: str


def mixed_samples(number: int, is_expressible: Callable[[str], bool] = lambda _: True) -> list[MixedSample]:
    """The first samples of an endless row.

    Args:
        number: How many.
        is_expressible: Whether a tokenizer has the characters of a text; others take the place of one that it
            has not, and pictures where it has none. Questions about pictures are plain ASCII.
    """
    texts = [text for text in TEXTS if is_expressible(text)]
    samples = _endless(texts)
    return [next(samples) for _ in range(number)]


def _endless(texts: Sequence[str]) -> Iterator[MixedSample]:
    scenes, names, printed, told = count(), cycle(NAMES), cycle(_PRINTED), cycle(texts)
    for number, turn in enumerate(cycle(TURNS if texts else PICTURE_TURNS)):
        is_bad, kind, seed = turn.startswith("bad "), turn.removeprefix("bad "), SEED + number
        if kind == "text":
            yield MixedSample("text", None, next(told))
            continue
        if kind == "photograph":
            image, question = photograph(next(names), Draw(seed))
        elif kind == "printed":
            kind = next(printed)
            image, question = _PRINTED[kind](Draw(seed))
        else:
            image, question = _scene(next(scenes))
        yield MixedSample(kind, badly_taken(image, seed) if is_bad else image, question)


def _scene(index: int) -> tuple[Image.Image, str]:
    """A scene of the demo; the kinds of questions take turns."""
    sample = make_sample(CALIBRATION_SEED + index)
    return sample.image, sample.questions[index % len(sample.questions)].question
