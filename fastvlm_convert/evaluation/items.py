"""Questions with known answers, and what every reader of annotations checks."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from PIL import Image

from fastvlm_convert.demo.camera import badly_taken
from fastvlm_convert.demo.samples import HELD_OUT_SEED, make_sample
from fastvlm_convert.errors import DatasetError, shown
from fastvlm_convert.evaluation.scores import Metric
from fastvlm_convert.json_file import parse_json
from fastvlm_convert.pictures import load_image
from fastvlm_convert.regular_file import open_file, read_text

Layout = Literal["demo", "jsonl", "vqav2", "textvqa", "docvqa", "ai2d"]

DEMO_PREFIX: Final = "demo/"
MAX_BYTES: Final = 1 << 30  # the largest published file, VQAv2's training annotations, has 356 MB
DOCS: Final = "docs/evaluate.md shows what is read"


@dataclass(frozen=True)
class Item:
    """A question about a picture whose answers are known.

    Attributes:
        id: Unlike every other's of its dataset.
        image: The picture's file below the dataset's folder of pictures; of the demo, `demo/NUMBER`.
        question: As the model is asked.
        answers: What people, or the authors, answered; at least one.
        place: Where it stands, for messages: `file.jsonl:3`.
    """

    id: str
    image: str
    question: str
    answers: tuple[str, ...]
    place: str


@dataclass(frozen=True)
class Dataset:
    """Questions to ask, and where their pictures are.

    Attributes:
        name: What people call it.
        layout: How it was written down.
        folder: Where its pictures are; None for the demo's, which are drawn.
        items: At least one; no two with the same id.
        num_listed: Questions that there were to choose from.
        metric: The score that results on it are usually given in.
        notes: What the user should know.
    """

    name: str
    layout: Layout
    folder: Path | None
    items: tuple[Item, ...]
    num_listed: int
    metric: Metric
    notes: tuple[str, ...] = ()

    @property
    def num_pictures(self) -> int:
        """Distinct pictures."""
        return len({item.image for item in self.items})

    @cached_property
    def sha256(self) -> str:
        """Hash of questions, answers and pictures, independent of where they lie.

        Raises:
            DatasetError: A picture cannot be read.
        """
        total = hashlib.sha256(self.layout.encode())
        for item in self.items:
            facts = [item.id, item.image, self._picture_hash(item), item.question, *item.answers]
            total.update(json.dumps(facts).encode())
        return total.hexdigest()

    def picture(self, item: Item) -> Image.Image:
        """An item's picture, RGB.

        Raises:
            ImageError: It cannot be decoded.
        """
        return demo_picture(item.image) if self.folder is None else load_image(self.folder / item.image)

    def _picture_hash(self, item: Item) -> str:
        return "" if self.folder is None else _file_hash(self.folder / item.image, item.place)


def demo_picture(name: str) -> Image.Image:
    """The demo's held-out picture of a name, `demo/NUMBER`.

    Those with an odd number are badly taken: on the clean ones even a ruined model may make no mistake.
    """
    number = int(name.removeprefix(DEMO_PREFIX))
    image = make_sample(HELD_OUT_SEED + number).image
    return badly_taken(image, number) if number % 2 else image


@lru_cache(maxsize=1)  # questions about one picture mostly follow each other
def _file_hash(path: Path, place: str) -> str:
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DatasetError(f"cannot read the picture {path}: {error.strerror}", where=place) from error


def read_annotations(path: Path) -> str:
    """The text of a file of annotations.

    Raises:
        DatasetError: It is missing, too large or no text.
    """
    try:
        return read_text(path, MAX_BYTES)
    except FileNotFoundError as error:
        hint = "give a file, or `demo` for the generated pictures"
        raise DatasetError("there is no such dataset", where=path, hint=hint) from error
    except OSError as error:
        raise DatasetError(f"cannot read: {error.strerror}", where=path, hint=DOCS) from error
    except ValueError as error:
        raise DatasetError(f"cannot read: {error}", where=path, hint="save it as UTF-8") from error


def parsed(text: str, where: str) -> Any:  # noqa: ANN401
    """The value of a JSON text.

    Raises:
        DatasetError: It is no JSON.
    """
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        what = f"not valid JSON: {error.msg} ({line}column {error.colno})"
        raise DatasetError(what, where=where, hint=DOCS) from error
    except ValueError as error:
        raise DatasetError(f"not valid JSON: {error}", where=where, hint=DOCS) from error


def text_of(entry: dict[str, Any], key: str, place: str) -> str:
    """A text that an entry must have, not blank.

    Raises:
        DatasetError: It does not.
    """
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(f"{key} is {_given(entry, key)}, expected a text", where=place, hint=DOCS)
    return value


def id_of(entry: dict[str, Any], key: str, place: str) -> str:
    """An id that an entry must have, a text or an integer.

    Raises:
        DatasetError: It does not.
    """
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        hint = "every question needs an id of its own"
        raise DatasetError(f"{key} is {_given(entry, key)}, expected an id", where=place, hint=hint)
    return str(value)


def answers_of(values: object, place: str) -> tuple[str, ...]:
    """The answers of an entry; annotators may have left some empty, but not all.

    Raises:
        DatasetError: There are none.
    """
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DatasetError(f"answers are {shown(values)}, expected a list of texts", where=place, hint=DOCS)
    if not any(value.strip() for value in values):
        hint = "every question needs an answer to compare with"
        raise DatasetError("the answers are empty", where=place, hint=hint)
    return tuple(values)


def without_twins(items: Sequence[Item]) -> tuple[Item, ...]:
    """The items, each with an id of its own.

    Raises:
        DatasetError: There are none, or two have the same id.
    """
    seen: dict[str, str] = {}
    for item in items:
        if item.id in seen:
            raise DatasetError(
                f"the id {shown(item.id)} stands there twice, first at {seen[item.id]}",
                where=item.place,
                hint="every question needs an id of its own",
            )
        seen[item.id] = item.place
    return tuple(items)


def found_picture(folder: Path, names: Sequence[str], place: str) -> str:
    """The first of some names, relative to a folder, under which there is a file.

    Raises:
        DatasetError: There is none, or a name leads out of the folder.
    """
    for name in names:
        _require_inside(folder, name, place)
        if (folder / name).is_file():
            return name
    others = f", nor {', '.join(names[1:])}" if len(names) > 1 else ""
    raise DatasetError(
        f"there is no picture {names[0]} in {folder}{others}",
        where=place,
        hint="--images FOLDER says where the pictures are",
    )


def _require_inside(folder: Path, name: str, place: str) -> None:
    path = PurePosixPath(name)
    is_inside = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    if not is_inside or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise DatasetError(
            f"the picture {shown(name)} is outside the dataset's folder {folder}",
            where=place,
            hint="name pictures relative to the dataset's file; --images FOLDER names another folder",
        )


def _given(entry: dict[str, Any], key: str) -> str:
    return shown(entry[key]) if key in entry else "missing"
