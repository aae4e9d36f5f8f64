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
from fastvlm_convert.mix.texts import WrittenText, texts_in_turn

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
        answer: What to take for the answer; None asks the model.
    """

    kind: str
    image: Image.Image | None
    question: str
    answer: str | None = None


def mixed_samples(number: int, is_expressible: Callable[[str], bool] = lambda _: True) -> list[MixedSample]:
    """The first samples of an endless row.

    Args:
        number: How many.
        is_expressible: Whether a tokenizer has the characters of a text; others take the place of one that it
            has not, and scenes where it has none. Questions about pictures are plain ASCII.
    """
    texts = [t for t in texts_in_turn() if is_expressible(t.question) and is_expressible(t.answer or "")]
    samples = _endless(texts)
    return [next(samples) for _ in range(number)]


def _endless(texts: Sequence[WrittenText]) -> Iterator[MixedSample]:
    scenes, names, printed, told = count(), cycle(NAMES), cycle(_PRINTED), cycle(texts)
    for number, turn in enumerate(cycle(TURNS)):
        is_bad, kind, seed = turn.startswith("bad "), turn.removeprefix("bad "), SEED + number
        if kind == "text" and texts:
            text = next(told)
            yield MixedSample("text", None, text.question, text.answer)
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
