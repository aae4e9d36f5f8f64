"""Annotations as their publishers wrote them: VQAv2, TextVQA, DocVQA and AI2D.

Each reader takes a parsed file and gives its questions. Pictures are looked for where the publishers'
archives put them, and beside the annotations.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from fastvlm_convert.errors import DatasetError, shown
from fastvlm_convert.evaluation.items import (
    DOCS,
    Item,
    Layout,
    answers_of,
    id_of,
    parsed,
    read_annotations,
    text_of,
)
from fastvlm_convert.evaluation.scores import Metric

_NO_ANSWERS: Final = "test splits are published without answers; take the train or val split"
_SUFFIXES: Final = (".jpg", ".png")


@dataclass(frozen=True)
class Listed:
    """A question of a published file, its picture not looked for yet.

    Attributes:
        item: The question; its `image` is empty.
        images: Where the picture may be, relative to the folder of pictures; the likeliest first.
    """

    item: Item
    images: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """What a published dataset holds.

    Attributes:
        layout: Which one it is.
        metric: The score that results on it are given in.
        folder: Where its pictures are unless the user says otherwise.
        questions: Its questions.
        notes: What the user should know.
    """

    layout: Layout
    metric: Metric
    folder: Path
    questions: list[Listed]
    notes: tuple[str, ...] = ()


def read_published(path: Path) -> Published:
    """The questions of a published file, or of AI2D's folder.

    Raises:
        DatasetError: It is none of these, or malformed.
    """
    if path.is_dir():
        return _ai2d_folder(path)
    value = parsed(read_annotations(path), str(path))
    keys = value.keys() if isinstance(value, dict) else set()
    if {"questions", "imageName"} <= keys:
        folder = path.parent.parent if path.parent.name == _AI2D_QUESTIONS else path.parent
        return Published("ai2d", "exact_match", folder, list(_ai2d(value, path)))
    if "annotations" in keys or "questions" in keys:
        return _vqav2(value, path)
    entries = value.get("data") if isinstance(value, dict) else None
    if isinstance(entries, list) and entries and isinstance(entries[0], dict):
        for key, read in (("image_id", _textvqa), ("questionId", _docvqa)):
            if key in entries[0]:
                return read(entries, path)
    raise DatasetError(
        f"a layout that is not known: {_looks(value)}",
        where=path,
        hint="VQAv2, TextVQA, DocVQA and AI2D are read as published, and our own .jsonl; " + DOCS,
    )


def _looks(value: object) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(shown(key) for key in list(value)[:6]) or 'none'}"
    return f"{'a list' if isinstance(value, list) else shown(value)}"


def _entries(values: object, key: str, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each entry of a list in a file, with its place."""
    if not isinstance(values, list) or not values:
        raise DatasetError(f"{key} is no list with entries", where=path, hint=DOCS)
    for number, entry in enumerate(values):
        place = f"{path}: {key}[{number}]"
        if not isinstance(entry, dict):
            raise DatasetError(f"the entry is {shown(entry)}, expected an object", where=place, hint=DOCS)
        yield entry, place


def _require_answers(entry: dict[str, Any], place: str) -> object:
    if "answers" not in entry:
        raise DatasetError("there are no answers", where=place, hint=_NO_ANSWERS)
    return entry["answers"]


# --- VQAv2 (and VQA v1): questions and annotations in files of their own, joined by question_id.

_QUESTIONS, _ANNOTATIONS = "questions", "annotations"
_IMAGE_PREFIXES: Final = {"mscoco": "COCO", "abstract_v002": "abstract_v002"}


def _vqav2(value: Mapping[str, Any], path: Path) -> Published:
    wanted = _QUESTIONS if _ANNOTATIONS in value else _ANNOTATIONS
    other_path = _partner(path, wanted)
    other = parsed(read_annotations(other_path), str(other_path))
    if not isinstance(other, dict) or wanted not in other:
        raise DatasetError(f"expected an object with {wanted}", where=other_path, hint=DOCS)
    subtypes = {str(file.get("data_subtype")) for file in (value, other)}
    if len(subtypes) > 1:
        what = f"the two files are of different splits: {' and '.join(sorted(subtypes))}"
        raise DatasetError(what, where=path, hint=f"put the {wanted} of the same split beside it")
    files = ((value, path), (other, other_path))
    (questions, questions_path), (annotations, annotations_path) = (
        files if wanted == _ANNOTATIONS else files[::-1]
    )
    answers = _vqav2_answers(annotations, annotations_path)
    listed = []
    for entry, place in _entries(questions[_QUESTIONS], _QUESTIONS, questions_path):
        name = id_of(entry, "question_id", place)
        if name not in answers:
            what = f"question {name} has no annotation in {annotations_path.name}"
            raise DatasetError(what, where=place, hint="the two files must belong to each other")
        item = Item(name, "", text_of(entry, "question", place), answers[name], place)
        listed.append(Listed(item, _vqav2_images(questions, id_of(entry, "image_id", place))))
    return Published("vqav2", "vqa_accuracy", path.parent, listed)


def _vqav2_answers(annotations: Mapping[str, Any], path: Path) -> dict[str, tuple[str, ...]]:
    """What the annotators answered, by the question's id."""
    answers = {}
    for entry, place in _entries(annotations[_ANNOTATIONS], _ANNOTATIONS, path):
        given = entry.get("answers")
        texts = (
            [a.get("answer") if isinstance(a, dict) else a for a in given]
            if isinstance(given, list)
            else given
        )
        name = id_of(entry, "question_id", place)
        if name in answers:
            what = f"the id {name} stands there twice"
            raise DatasetError(what, where=place, hint="every question needs an id of its own")
        answers[name] = answers_of(texts, place)
    return answers


def _vqav2_images(questions: Mapping[str, Any], image_id: str) -> tuple[str, ...]:
    kind, subtype = str(questions.get("data_type", "mscoco")), str(questions.get("data_subtype", "val2014"))
    names = [f"{_IMAGE_PREFIXES.get(kind, kind)}_{subtype}_{image_id.zfill(12)}{end}" for end in _SUFFIXES]
    folders = (f"{subtype}/", "", "images/", f"Images/{kind}/{subtype}/", f"{kind}/{subtype}/")
    return tuple(f"{folder}{name}" for name in names for folder in folders)


def _partner(path: Path, wanted: str) -> Path:
    """The file of questions that belongs to one of annotations, or the other way round.

    Raises:
        DatasetError: It is not beside it.
    """
    if wanted == _ANNOTATIONS:
        name = re.sub(r"(OpenEnded|MultipleChoice)_", "", path.name).replace(_QUESTIONS, _ANNOTATIONS)
    else:
        name = re.sub(r"^(v\d_)?", r"\1OpenEnded_", path.name).replace(_ANNOTATIONS, _QUESTIONS)
    if name != path.name and (path.parent / name).is_file():
        return path.parent / name
    others = [p for p in sorted(path.parent.glob("*.json")) if wanted in p.name and p != path]
    if len(others) == 1:
        return others[0]
    raise DatasetError(
        f"the {wanted} that belong to it are not beside it: expected {name}",
        where=path,
        hint="VQAv2 comes in two files, questions and annotations; put both into one folder",
    )


# --- TextVQA and DocVQA: one list, `data`.


def _textvqa(entries: list[Any], path: Path) -> Published:
    listed = []
    for entry, place in _entries(entries, "data", path):
        answers = answers_of(_require_answers(entry, place), place)
        name = id_of(entry, "question_id", place)
        item = Item(name, "", text_of(entry, "question", place), answers, place)
        image = id_of(entry, "image_id", place)
        folders = ("train_images/", "test_images/", "val_images/", "images/", "")
        listed.append(Listed(item, tuple(f"{f}{image}{end}" for end in _SUFFIXES for f in folders)))
    return Published("textvqa", "vqa_accuracy", path.parent, listed)


def _docvqa(entries: list[Any], path: Path) -> Published:
    listed = []
    for entry, place in _entries(entries, "data", path):
        answers = answers_of(_require_answers(entry, place), place)
        name = id_of(entry, "questionId", place)
        item = Item(name, "", text_of(entry, "question", place), answers, place)
        image = text_of(entry, "image", place)
        base = PurePosixPath(image).name
        listed.append(Listed(item, (image, f"spdocvqa_images/{base}", base)))
    return Published("docvqa", "anls", path.parent, listed)


# --- AI2D: a file for each picture, questions with four answers to choose from.

_AI2D_QUESTIONS: Final = "questions"
_TEST_IDS: Final = "ai2d_test_ids.csv"
_LETTERS: Final = "ABCDEFGHIJ"


def _ai2d_folder(path: Path) -> Published:
    root = path.parent if path.name == _AI2D_QUESTIONS and not (path / _AI2D_QUESTIONS).is_dir() else path
    files = sorted((root / _AI2D_QUESTIONS).glob("*.json"), key=_by_number)
    if not files:
        raise DatasetError(
            "a folder is read as AI2D, and this one has no questions/*.json",
            where=path,
            hint="give the file of the questions; " + DOCS,
        )
    notes: tuple[str, ...] = ()
    if (root / _TEST_IDS).is_file():
        chosen = set(read_annotations(root / _TEST_IDS).split())
        files = [file for file in files if file.name.partition(".")[0] in chosen]
        notes = (f"{_TEST_IDS} chooses {len(files)} of AI2D's pictures",)
    listed: list[Listed] = []
    num_letters = 0
    for file in files:
        value = parsed(read_annotations(file), str(file))
        found = list(_ai2d(value, file))
        num_letters += sum(bool(q.get("abcLabel")) for q in value["questions"].values())
        listed += found
    if num_letters:
        notes += (
            f"questions about letters (abcLabel), which the published pictures do not show: {num_letters}",
        )
    return Published("ai2d", "exact_match", root, listed, notes)


def _by_number(path: Path) -> tuple[int, str]:
    number = path.name.partition(".")[0]
    return int(number) if number.isdecimal() else 0, path.name


def _ai2d(value: object, path: Path) -> Iterator[Listed]:
    if not isinstance(value, dict) or not isinstance(value.get("questions"), dict):
        raise DatasetError("expected an object with imageName and questions", where=path, hint=DOCS)
    image = text_of(value, "imageName", str(path))
    for question, entry in value["questions"].items():
        place = f"{path}: {shown(question)}"
        if not isinstance(entry, dict):
            raise DatasetError(f"the entry is {shown(entry)}, expected an object", where=place, hint=DOCS)
        choices = answers_of(entry.get("answerTexts"), place)
        right = entry.get("correctAnswer")
        if type(right) is not int or not 0 <= right < min(len(choices), len(_LETTERS)):
            what = f"correctAnswer is {shown(right)}, expected 0 to {len(choices) - 1}"
            raise DatasetError(what, where=place, hint=DOCS)
        lettered = [f"{letter}. {text}" for letter, text in zip(_LETTERS, choices, strict=False)]
        answers = (_LETTERS[right], choices[right], lettered[right])
        name = id_of(entry, "questionId", place)
        item = Item(name, "", "\n".join([question, *lettered]), answers, place)
        yield Listed(item, (f"images/{image}", image))
