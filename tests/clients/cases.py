"""The checkpoints and questions that every client is tried with."""

import json
from pathlib import Path

from PIL import Image

from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import Recipe, without_data
from tests.checkpoints import GOLDEN, HF, LLAVA, golden_cases
from tests.clients.transformers_js import Task
from tests.commands import ROOT

DEMO = ROOT / "checkpoints" / "fastvlm-demo"
# The third golden set is not among them: its heads of 8 are refused for ONNX.
CHECKPOINTS = {"demo": DEMO} | {name: GOLDEN / name / "checkpoint" for name in (LLAVA, HF)}


def make_bundle(checkpoint: str, settings: Recipe, folder: Path) -> Path:
    """An ONNX bundle of one of the checkpoints, without calibration: both sides read the same integers."""
    bundle = folder / settings.name
    export(CHECKPOINTS[checkpoint], bundle, recipe=without_data(settings), targets="onnx")
    return bundle


def tasks_of(checkpoint: str) -> list[Task]:
    """Square pictures as files, others as pixels: clients resize in ways of their own."""
    if checkpoint != "demo":
        return [Task(case.image, case.question, True) for case in golden_cases() if case.name == checkpoint]
    entries = json.loads((DEMO / "check_images" / "questions.json").read_text())[:4]
    files = [DEMO / "check_images" / entry["image"] for entry in entries]
    tasks = [
        Task(file, entry["question"], is_prepared=len(set(Image.open(file).size)) == 2)
        for file, entry in zip(files, entries, strict=True)
    ]
    return [*tasks, Task(files[0], "Describe the image.")]
