"""What each model is asked: pictures of its kind and prompts that nothing was calibrated with."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from PIL import Image

from benchmarks.real_model import write_real_model
from fastvlm_convert.demo.camera import badly_taken
from fastvlm_convert.demo.draw import Draw
from fastvlm_convert.demo.samples import HELD_OUT_SEED
from fastvlm_convert.evaluation.scores import exact_match

if TYPE_CHECKING:
    from style import Style

ROOT: Final = Path(__file__).parents[2]
DEMO: Final = ROOT / "checkpoints" / "fastvlm-demo"
UNSEEN: Final = ROOT / "training" / "unseen" / "checkpoint"
PROMPTS: Final = Path(__file__).parent / "prompts.jsonl"
PICTURES: Final = 320
FIRST_SEED: Final = HELD_OUT_SEED + 700_000  # of neither training nor calibration
NOISE_SEED: Final = 1
REAL_KINDS: Final = ("color", "word", "number", "format", "position")  # what it answers well
PICTURE_TOKENS, TEXT_TOKENS = 64, 24


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        picture: Number of the picture in its set; None for text alone.
        kind: What it asks for.
        text: The question.
        known: Right answers; none where there is no telling.
    """

    picture: int | None
    kind: str
    text: str
    known: tuple[str, ...]


@dataclass(frozen=True)
class QuestionSet:
    """Questions that are judged together.

    Attributes:
        pictures: RGB.
        questions: About them.
        is_right: Whether an answer is one of those that are known.
        max_tokens: Of an answer.
    """

    pictures: tuple[Image.Image, ...]
    questions: tuple[Question, ...]
    is_right: Callable[[str, Sequence[str]], bool]
    max_tokens: int


Pictures = Literal["demo", "unseen"]


def prompts() -> QuestionSet:
    """The committed text prompts."""
    entries = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    found = [Question(None, e["kind"], e["prompt"], tuple(e.get("known", ()))) for e in entries]
    return QuestionSet((), tuple(found), names_one, TEXT_TOKENS)


def pictures(
    style: Pictures, bad: bool, count: int, a_picture: int, kinds: Sequence[str] = ()
) -> QuestionSet:
    """Pictures that no training and no calibration has seen.

    Args:
        style: Whose pictures.
        bad: Blurred and noisy.
        count: Pictures.
        a_picture: Questions about each, at most.
        kinds: Of questions; all if there are none.
    """
    images, found = [], []
    for number, (image, asked) in enumerate(_drawn(_style(style), count, bad)):
        images.append(image)
        fitting = [q for q in asked if not kinds or q.kind in kinds]
        turned = fitting[number % len(fitting) :] + fitting[: number % len(fitting)]
        found += [Question(number, q.kind, q.question, (q.answer,)) for q in turned[:a_picture]]
    return QuestionSet(tuple(images), tuple(found), is_exactly_one, PICTURE_TOKENS)


def _drawn(style: "Style", count: int, bad: bool) -> Iterator[tuple[Image.Image, list]]:
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        draw = Draw(seed)
        scene = style.make(draw)
        image, asked = style.render(scene), style.ask_all(scene, draw)
        yield (badly_taken(image, seed) if bad else image), asked


def _style(name: Pictures) -> "Style":
    """A style of pictures; the code that draws it lies where the models are trained, and is no package."""
    folder = str(ROOT / "training")
    if folder not in sys.path:
        sys.path.append(folder)
    import style

    return {"demo": style.DEMO, "unseen": style.UNSEEN}[name]


def is_exactly_one(answer: str, known: Sequence[str]) -> bool:
    """Whether an answer is one of those that are known, but for case and white space."""
    return exact_match(answer, known) == 1


def names_one(answer: str, known: Sequence[str]) -> bool:
    """Whether one of the known answers stands in an answer, as words of their own."""
    return any(re.search(rf"(?<!\w){re.escape(k)}(?!\w)", answer, re.IGNORECASE) for k in known)


def question_sets(model: str, count: int = PICTURES) -> dict[str, QuestionSet]:
    """What a model is asked, by the name of the set.

    Args:
        model: `demo`, `unseen`, `real`, `noisy`, or the folder of a model of the demo's kind.
        count: Pictures of each set.
    """
    if model in ("real", "noisy"):
        return {"pictures": pictures("demo", False, count, 1, REAL_KINDS), "text": prompts()}
    if model == "unseen":
        return {bad: pictures("unseen", bad == "hard", count, 1) for bad in ("clean", "hard")}
    return {"hard": pictures("demo", True, count, 1)}


def folder_of(model: str, work: Path) -> Path:
    """The checkpoint of a model; one that is not committed is written below `work`."""
    if model in ("demo", "unseen"):
        return {"demo": DEMO, "unseen": UNSEEN}[model]
    if model not in ("real", "noisy"):
        return Path(model)
    folder = work / model
    if not (folder / "generation_config.json").exists():
        write_real_model(folder, NOISE_SEED if model == "noisy" else None)
    return folder
