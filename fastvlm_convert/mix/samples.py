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
# Every second picture is badly taken: weights that suit clean ones alone are wrong for all others. There are
# seven turns, so that every tenth sample, which is held out, meets all of them in seventy samples.
TURNS: Final = ("scene", "photograph", "printed", "text", "bad scene", "bad photograph", "bad printed")
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
    """The first samples of an endless row, and more texts: up to three for every two of those.

    A real language model's weights are solved with too few words otherwise, and texts need no encoder.

    Args:
        number: How many of the row; the texts that follow are those that have had no turn, as far as they go.
        is_expressible: Whether a tokenizer has the characters of a text; others take the place of one that it
            has not. Questions about pictures are plain ASCII.
    """
    texts = [text for text in TEXTS if is_expressible(text)]
    endless = _endless(texts)
    samples = [next(endless) for _ in range(number)]
    told = sum(sample.kind == "text" for sample in samples)
    return [*samples, *(MixedSample("text", None, text) for text in texts[told : told + number // 2 * 3])]


def _endless(texts: Sequence[str]) -> Iterator[MixedSample]:
    scenes, names, printed, told = count(), cycle(NAMES), cycle(_PRINTED), cycle(texts)
    for number in count():
        turn, seed = TURNS[number % len(TURNS)], SEED + number
        is_bad, kind = turn.startswith("bad "), turn.removeprefix("bad ")
        if kind == "text" and texts:
            yield MixedSample("text", None, next(told))
            continue
        if kind == "photograph":
            image, question = photograph(next(names), Draw(seed))
        elif kind == "printed":
            kind = next(printed)
            image, question = _PRINTED[kind](Draw(seed))
        else:  # a scene, which also takes the place of a text where none can be expressed
            kind = "scene"
            image, question = _scene(next(scenes))
        yield MixedSample(kind, badly_taken(image, seed) if is_bad else image, question)


def _scene(index: int) -> tuple[Image.Image, str]:
    """A scene of the demo; the kinds of questions take turns."""
    sample = make_sample(CALIBRATION_SEED + index)
    return sample.image, sample.questions[index % len(sample.questions)].question
