"""The checkpoints and questions that every client is tried with."""

import json
from dataclasses import replace
from pathlib import Path

from fastvlm_convert.pipeline import export
from fastvlm_convert.recipe import Recipe, without_data
from tests.checkpoints import GOLDEN, HF, LLAVA, golden_cases
from tests.clients.transformers_js import Task
from tests.commands import ROOT

DEMO = ROOT / "checkpoints" / "fastvlm-demo"
# The third golden set is not among them: its heads of 8 are refused for ONNX.
CHECKPOINTS = {"demo": DEMO} | {name: GOLDEN / name / "checkpoint" for name in (LLAVA, HF)}


def make_bundle(checkpoint: str, settings: Recipe, folder: Path) -> Path:
    """An ONNX bundle of one of the checkpoints, calibrated only where ranges of activations must be measured.

    Both sides read the same integers, however good they are.
    """
    bundle = folder / settings.name
    if settings.vision.activations == "float":
        settings = without_data(settings)
    else:
        settings = replace(settings, calibration=replace(settings.calibration, num_samples=2))
    export(CHECKPOINTS[checkpoint], bundle, recipe=settings, targets="onnx")
    return bundle


def tasks_of(checkpoint: str) -> list[Task]:
    """A few questions; clients that resize in ways of their own get pixels instead of pictures."""
    if checkpoint != "demo":
        return [Task(case.image, case.question, True) for case in golden_cases() if case.name == checkpoint]
    folder = DEMO / "check_images"
    entries = json.loads((folder / "questions.json").read_text())[:4]
    tasks = [Task(folder / entry["image"], entry["question"], True) for entry in entries]
    return [*tasks, Task(tasks[0].image, "Describe the image.", True)]
