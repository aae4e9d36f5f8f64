"""Pictures with questions, by seed: the held-out set, the check pictures and those for calibration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fastvlm_convert.demo.camera import badly_taken
from fastvlm_convert.demo.draw import Draw
from fastvlm_convert.demo.questions import KINDS, Question, ask_all
from fastvlm_convert.demo.render import render
from fastvlm_convert.demo.scene import Scene, make_scene

# Training uses seeds below the first of these; the ranges never meet.
HELD_OUT_SEED = 1_000_000_000
CHECK_SEED = 2_000_000_000
CALIBRATION_SEED = 3_000_000_000


@dataclass(frozen=True)
class Sample:
    """A picture, what it shows, and one question of every kind it allows."""

    scene: Scene
    image: Image.Image
    questions: tuple[Question, ...]


def make_sample(seed: int) -> Sample:
    """The sample of one seed, always the same."""
    draw = Draw(seed)
    scene = make_scene(draw)
    return Sample(scene, render(scene), ask_all(scene, draw))


def held_out(count: int = 500) -> list[Sample]:
    """Samples that training never sees."""
    return [make_sample(HELD_OUT_SEED + index) for index in range(count)]


def check_samples() -> list[tuple[Image.Image, Question]]:
    """Sixteen pictures of mixed formats, one question each, every kind at least once."""
    samples = []
    seed = CHECK_SEED
    for kind in (*KINDS, "description", "word", "color", "position"):
        while (found := _question_of(make_sample(seed), kind)) is None:
            seed += 1
        samples.append(found)
        seed += 1
    return samples


def calibration_samples(count: int) -> list[tuple[Image.Image, Question]]:
    """Scenes alone to calibrate with, one question each; the kinds take turns.

    Every second picture is badly taken: weights that suit clean drawings alone are wrong for all others.
    """
    samples = []
    for index in range(count):
        seed = CALIBRATION_SEED + index
        sample = make_sample(seed)
        image = badly_taken(sample.image, seed) if index % 2 else sample.image
        samples.append((image, sample.questions[index % len(sample.questions)]))
    return samples


def write_check_images(folder: Path) -> None:
    """Write the check pictures as PNG files, with `questions.json` beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, (image, question) in enumerate(check_samples()):
        name = f"{index:02d}.png"
        image.save(folder / name, optimize=True)
        entries.append({"image": name, "question": question.question, "answer": question.answer})
    (folder / "questions.json").write_text(json.dumps(entries, indent=2) + "\n")


def _question_of(sample: Sample, kind: str) -> tuple[Image.Image, Question] | None:
    question = next((q for q in sample.questions if q.kind == kind), None)
    return None if question is None else (sample.image, question)
