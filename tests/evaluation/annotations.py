"""Small datasets in the layouts as they are published, made by us."""

import json
from pathlib import Path
from typing import Any

from PIL import Image


def picture(path: Path, color: str = "red") -> Path:
    """A small picture, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), color).save(path)
    return path


def write_lines(path: Path, entries: list[Any]) -> Path:
    """Our own layout: an object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def write_json(path: Path, value: object) -> Path:
    """A file of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def vqav2(folder: Path) -> tuple[Path, Path]:
    """Questions and annotations of two pictures; three questions."""
    for number in (42, 73):
        picture(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    head = {"info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    asked = [(42, 42000, "What color is it?"), (42, 42001, "Is it red?"), (73, 73000, "How many?")]
    questions = [{"image_id": i, "question": text, "question_id": n} for i, n, text in asked]
    annotations = [
        {
            "question_type": "what", "answer_type": "other", "multiple_choice_answer": "red",
            "image_id": image, "question_id": number,
            "answers": [
                {"answer": "red" if n < 7 else "", "answer_confidence": "yes", "answer_id": n + 1}
                for n in range(10)
            ],
        }
        for image, number, _ in reversed(asked)
    ]  # fmt: skip
    return (
        write_json(
            folder / "v2_OpenEnded_mscoco_val2014_questions.json",
            {**head, "task_type": "Open-Ended", "questions": questions},
        ),
        write_json(folder / "v2_mscoco_val2014_annotations.json", {**head, "annotations": annotations}),
    )


def textvqa(folder: Path) -> Path:
    """One question about one picture."""
    picture(folder / "train_images" / "003a8ae2ef43b901.jpg")
    entry = {
        "question": "what is the brand of this camera?", "image_id": "003a8ae2ef43b901",
        "image_classes": ["Camera"], "flickr_original_url": "", "flickr_300k_url": "", "image_width": 1024,
        "image_height": 664, "answers": ["dakota"] * 8 + ["dakota digital", "clos culombu"],
        "question_tokens": ["what"], "question_id": 34602, "set_name": "val",
    }  # fmt: skip
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    return write_json(folder / "TextVQA_0.5.1_val.json", {**head, "data": [entry]})


def docvqa(folder: Path) -> Path:
    """One question about one page."""
    picture(folder / "documents" / "pybv0228_81.png")
    entry = {
        "questionId": 49153, "question": "What is the actual value per 1000?",
        "question_types": ["figure/diagram"], "image": "documents/pybv0228_81.png", "docId": 14465,
        "ucsf_document_id": "pybv0228", "ucsf_document_page_no": "81", "answers": ["0.28"],
        "data_split": "val",
    }  # fmt: skip
    head = {"dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": "val"}
    return write_json(folder / "val_v1.0.json", {**head, "data": [entry]})


def ai2d(folder: Path) -> Path:
    """Two diagrams; of the second the questions are about letters."""
    for number, question in ((2, "What do owls eat?"), (10, "What is A in the diagram?")):
        picture(folder / "images" / f"{number}.png")
        entry = {
            "abcLabel": number == 10, "answerTexts": ["grass", "mice", "owls", "none"], "correctAnswer": 1,
            "questionId": f"{number}.png-0",
        }  # fmt: skip
        write_json(
            folder / "questions" / f"{number}.png.json",
            {"questions": {question: entry}, "imageName": f"{number}.png"},
        )
    return folder
