"""Questions about pictures: to compare models on, and to calibrate with."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, overload

from PIL import Image

from fastvlm_convert.demo.camera import badly_taken, double_exposure
from fastvlm_convert.demo.samples import check_samples
from fastvlm_convert.errors import ImageError
from fastvlm_convert.json_file import parse_json
from fastvlm_convert.mix import mixed_samples
from fastvlm_convert.pictures import PICTURE_SUFFIXES, is_picture, load_image
from fastvlm_convert.prompt import Message, user_message
from fastvlm_convert.regular_file import read_text

DEFAULT_QUESTION: Final = "Describe the image."
LISTING: Final = "questions.json"


@dataclass(frozen=True)
class Question:
    """A question about pictures.

    Attributes:
        images: RGB; none for a question of text alone.
        text: The question.
        answer: The answer to calibrate with; None asks the reference.
        label: What the pictures are called in reports: their files, or how they were made.
    """

    images: tuple[Image.Image, ...]
    text: str
    answer: str | None = None
    label: str | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        """The question as a conversation: pictures first, then the text, in which `<image>` is text."""
        return (user_message(self.text, self.images),)


@dataclass(frozen=True)
class QuestionSet(Sequence[Question]):
    """Questions that were read, and what was not.

    Attributes:
        questions: At least one.
        num_pictures: Distinct pictures in them.
        num_listed: Questions that there were to choose from.
        skipped: Files of a folder that were left out, each with the reason.
    """

    questions: tuple[Question, ...]
    num_pictures: int
    num_listed: int
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.questions)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Question, ...]: ...
    def __getitem__(self, index: int | slice) -> Question | tuple[Question, ...]:
        return self.questions[index]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know: how many of the pictures are used, and what was left out."""
        notes = []
        if self.num_listed > len(self.questions):
            notes.append(
                f"{len(self.questions)} of {self.num_listed} questions are used, about {self.num_pictures} "
                "distinct pictures"
            )
        if self.skipped:
            few = "; ".join(self.skipped[:_FEW])
            more = f" and {len(self.skipped) - _FEW} more" if len(self.skipped) > _FEW else ""
            notes.append(f"{len(self.skipped)} files were skipped: {few}{more}")
        return tuple(notes)


_FEW: Final = 5
_OTHER: Final = 5  # how far apart the two pictures of a double exposure stand in the list
_TEXT_ALONE: Final = (
    "What is your name?",
    "What color is a star?",
    "How many shapes are there?",
    "Describe the image.",
)


def standard_questions() -> QuestionSet:
    """The standard check pictures of the demo generator, one question each."""
    questions = tuple(
        Question((image,), question.question, label=f"generated {n:02d}")
        for n, (image, question) in enumerate(check_samples())
    )
    return QuestionSet(questions, len(questions), len(questions))


def hard_questions() -> QuestionSet:
    """What `verify` asks by default: questions that a model is not sure about.

    Each check picture blurred and noisy, and blurred, noisy and with another one shining through, and text
    alone. Of clean drawings the demo model is so sure that even a ruined encoder changes no answer.
    """
    asked = standard_questions().questions
    pictures = [q.images[0] for q in asked]
    questions = [
        Question((badly_taken(picture, n),), q.text, label=f"check {n:02d}, blurred and noisy")
        for n, (q, picture) in enumerate(zip(asked, pictures, strict=True))
    ]
    for n, (q, picture) in enumerate(zip(asked, pictures, strict=True)):
        other = (n + _OTHER) % len(pictures)
        image = badly_taken(double_exposure(picture, pictures[other]), n)
        label = f"check {n:02d} over {other:02d}, blurred and noisy"
        questions.append(Question((image,), q.text, label=label))
    alone = tuple(Question((), text) for text in _TEXT_ALONE)
    return QuestionSet((*questions, *alone), len(questions), len(questions) + len(alone))


def mixed_questions(count: int, is_expressible: Callable[[str], bool]) -> QuestionSet:
    """Photographs, printed matter, scenes and text alone for calibration.

    Args:
        count: How many questions take turns; more texts follow (`mix.samples.mixed_samples`).
        is_expressible: Whether the tokenizer has the characters of a text; others take the place of one that
            it has not.
    """
    questions = tuple(
        Question(() if s.image is None else (s.image,), s.question, label=f"{s.kind} {n:02d}")
        for n, s in enumerate(mixed_samples(count, is_expressible))
    )
    return QuestionSet(questions, sum(len(q.images) for q in questions), len(questions))


def read_questions(path: Path, at_most: int | None = None) -> QuestionSet:
    """The pictures of a folder or of a JSON lines file.

    A folder has a `questions.json`, a list of objects with `question`, perhaps `image` or `images`, and
    perhaps `answer`; or its pictures, those of subfolders too, get one default question each. A `.jsonl` file
    has such an object a line. Pictures are named relative to where they are listed.

    Args:
        path: The folder or file.
        at_most: Questions read; None reads all. Of more, those about pictures not seen yet go first.

    Raises:
        ImageError: There is no such folder or file, it names no pictures, or one cannot be read.
    """
    if path.is_file() and path.suffix == ".jsonl":
        lines = _read_text(path).split("\n")  # not splitlines: JSON strings may hold U+2028
        entries = [_parsed(line, path, f"line {n + 1}: ") for n, line in enumerate(lines) if line.strip()]
        return _question_set(entries, path.parent, path, at_most)
    if not path.is_dir():
        missing = "there is no such file" if path.suffix == ".jsonl" else "there is no such folder of images"
        what = "neither a folder of images nor a .jsonl file" if path.exists() else missing
        raise ImageError(what, where=path, hint=_GIVE)
    listing = path / LISTING
    if listing.is_file():
        value = _parsed(_read_text(listing), listing)
        if not isinstance(value, list):
            raise ImageError(f"expected a list, each entry {_EXPECTED}", where=listing, hint=_DOCS)
        return _question_set(value, path, listing, at_most)
    return _folder_questions(path, at_most)


def _folder_questions(folder: Path, at_most: int | None) -> QuestionSet:
    """One question a picture, below a folder."""
    names: list[str] = []
    skipped: list[str] = []
    for name in sorted(_files_below(folder)):
        if any(part.startswith(".") for part in Path(name).parts):
            skipped.append(f"{name} (hidden)")
        elif name.lower().endswith(PICTURE_SUFFIXES) or is_picture(folder / name):
            names.append(name)
        else:
            skipped.append(f"{name} (not a picture)")
    if not names:
        why = f"skipped: {'; '.join(skipped[:_FEW])}" if skipped else _GIVE
        raise ImageError(f"no images here ({', '.join(PICTURE_SUFFIXES)})", where=folder, hint=why)
    chosen = names[:at_most]
    questions = tuple(Question((load_image(folder / name),), DEFAULT_QUESTION, label=name) for name in chosen)
    return QuestionSet(questions, len(questions), len(names), tuple(skipped))


def _files_below(folder: Path) -> Iterator[str]:
    """Files of a folder and its subfolders, relative to it; links to folders are not followed."""
    for root, _, files in os.walk(folder, onerror=_raise_unreadable):
        for file in files:
            yield (Path(root) / file).relative_to(folder).as_posix()


def _raise_unreadable(error: OSError) -> None:
    raise ImageError(f"cannot read: {error.strerror}", where=error.filename, hint=_GIVE) from error


_GIVE: Final = "give a folder of images, or a .jsonl file that lists them"
_DOCS: Final = "docs/quality.md shows both forms of a list"
_EXPECTED: Final = (
    "an object with 'image', 'question' and perhaps 'answer' ('images' for several, neither for text alone)"
)


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise ImageError(f"cannot read: {error.strerror}", where=path, hint=_GIVE) from error
    except ValueError as error:
        raise ImageError(f"cannot read: {error}", where=path, hint="save it as UTF-8") from error


def _parsed(text: str, where: Path, place: str = "") -> Any:  # noqa: ANN401
    try:
        return parse_json(text)
    except ValueError as error:
        raise ImageError(f"{place}not valid JSON: {error}", where=where, hint=_DOCS) from error


def _question_set(entries: Sequence[Any], folder: Path, where: Path, at_most: int | None) -> QuestionSet:
    if not entries:
        raise ImageError("no entries here", where=where, hint=f"each entry is {_EXPECTED}")
    listed = [_listed_pictures(entry, number, where) for number, entry in enumerate(entries)]
    chosen = _distinct_first(listed)[:at_most]
    questions = tuple(
        Question(
            tuple(load_image(folder / name) for name in listed[n]),
            entries[n]["question"],
            entries[n].get("answer"),
            ", ".join(listed[n]) or None,
        )
        for n in chosen
    )
    distinct = {name for n in chosen for name in listed[n]}
    return QuestionSet(questions, len(distinct), len(entries))


def _listed_pictures(entry: object, number: int, where: Path) -> tuple[str, ...]:
    """File names of an entry's pictures.

    Raises:
        ImageError: The entry is not of the form that is expected.
    """
    if isinstance(entry, dict) and isinstance(entry.get("question"), str):
        names = entry.get("images", []) if "image" not in entry else [entry["image"]]
        both = "image" in entry and "images" in entry
        is_listed = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
        if is_listed and not both and isinstance(entry.get("answer"), str | None):
            return tuple(names)
    raise ImageError(f"entry {number + 1}: expected {_EXPECTED}", where=where, hint=_DOCS)


def _distinct_first(listed: Sequence[tuple[str, ...]]) -> list[int]:
    """Numbers of the entries: the first about each picture, then the second about each, and so on."""
    seen: dict[tuple[str, ...], int] = {}
    rounds = []
    for number, names in enumerate(listed):
        seen[names] = seen.get(names, -1) + 1
        # Texts alone are as distinct as pictures are.
        rounds.append((seen[names] if names else 0, number))
    return [number for _, number in sorted(rounds)]
