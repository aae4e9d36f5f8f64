"""Open a dataset: the demo's held-out pictures, our JSON lines, or a published layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from fastvlm_convert.demo.samples import HELD_OUT_SEED, make_sample
from fastvlm_convert.errors import DatasetError, shown
from fastvlm_convert.evaluation.items import (
    DEMO_PREFIX,
    DOCS,
    Dataset,
    Item,
    answers_of,
    found_picture,
    id_of,
    parsed,
    read_annotations,
    text_of,
    without_twins,
)
from fastvlm_convert.evaluation.layouts import Listed, Published, read_published

DEMO: Final = "demo"
DEMO_PICTURES: Final = 200


def open_dataset(source: str, *, images: Path | None = None, limit: int | None = None) -> Dataset:
    """Read a dataset's questions; its pictures are looked for, but not decoded yet.

    Args:
        source: `demo`, a `.jsonl` file, a published file of annotations, or AI2D's folder.
        images: Where the pictures are, unless they are beside the annotations.
        limit: Take the first so many questions; None takes all, and of the demo 200.

    Raises:
        DatasetError: It is missing, malformed, of a layout that is not known, or a picture is missing.
    """
    if source == DEMO:
        if images is not None:
            hint = "leave --images out; ./demo names a file or folder of yours"
            raise DatasetError("the demo draws its pictures itself", where=images, hint=hint)
        return demo_dataset(DEMO_PICTURES if limit is None else limit)
    if images is not None and not images.is_dir():
        raise DatasetError("there is no such folder of pictures", where=images, hint="check --images")
    path = Path(source)
    if path.suffix == ".jsonl":
        listing = Published("jsonl", "exact_match", path.parent, _read_lines(path))
    else:
        listing = read_published(path)
    folder = images or listing.folder
    items = without_twins([question.item for question in listing.questions])
    if not items:
        raise DatasetError("there are no questions", where=path, hint=DOCS)
    chosen = [_with_picture(question, folder) for question in listing.questions[:limit]]
    return Dataset(
        path.name, listing.layout, folder, tuple(chosen), len(items), listing.metric, listing.notes
    )


def demo_dataset(count: int) -> Dataset:
    """Held-out pictures of the demo, one question each; the kinds take turns, every second is badly taken."""
    items = []
    for number in range(count):
        questions = make_sample(HELD_OUT_SEED + number).questions
        question = questions[number % len(questions)]
        name = f"{DEMO_PREFIX}{number}"
        items.append(Item(name, name, question.question, (question.answer,), name))
    return Dataset(DEMO, "demo", None, tuple(items), count, "exact_match")


def _with_picture(question: Listed, folder: Path) -> Item:
    return replace(question.item, image=found_picture(folder, question.images, question.item.place))


def _read_lines(path: Path) -> list[Listed]:
    lines = read_annotations(path).split("\n")  # not splitlines: JSON strings may hold U+2028
    return [_listed(line, number, path) for number, line in enumerate(lines, 1) if line.strip()]


def _listed(line: str, number: int, path: Path) -> Listed:
    """A question of a JSON line.

    Raises:
        DatasetError: Says what is wrong with it.
    """
    place = f"{path}:{number}"
    entry = parsed(line, place)
    if not isinstance(entry, dict):
        raise DatasetError(f"the line holds {shown(entry)}, expected an object", where=place, hint=DOCS)
    name = id_of(entry, "id", place) if "id" in entry else str(number)
    answers = answers_of(_given_answers(entry, place), place)
    if not all(answer.strip() for answer in answers):
        raise DatasetError("an answer is empty", where=place, hint="leave it out")
    item = Item(name, "", text_of(entry, "question", place), answers, place)
    return Listed(item, (text_of(entry, "image", place),))


def _given_answers(entry: dict[str, Any], place: str) -> object:
    """`answers`, or the one `answer` that lists of pictures to calibrate with have."""
    if ("answers" in entry) == ("answer" in entry):
        what = "both answers and answer are there" if "answer" in entry else "answers are missing"
        raise DatasetError(what, where=place, hint=DOCS)
    return entry["answers"] if "answers" in entry else [entry["answer"]]
