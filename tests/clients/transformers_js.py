"""Questions to a bundle, answered by unmodified transformers.js in Node and by our own runtime."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_convert.generate import generate
from fastvlm_convert.io_names import Precision
from fastvlm_convert.manifest import load_manifest, takes_pictures
from fastvlm_convert.pictures import load_image
from fastvlm_convert.preprocess import pixel_values
from fastvlm_convert.runtime.loaded import load_bundle
from tests.clients.node import run_node

NEW_TOKENS = 24  # as many as the goldens have


@dataclass(frozen=True)
class Task:
    """A question about a picture.

    Attributes:
        image: The picture's file; None asks about none.
        question: The question.
        is_prepared: Whether a client that would resize the picture itself gets the pixels from us.
    """

    image: Path | None
    question: str
    is_prepared: bool = False


def ask_transformers_js(
    bundles: Path,
    loads: Sequence[tuple[str, Mapping[str, Any]]],
    tasks: Sequence[Task],
    folder: Path,
    max_new_tokens: int = NEW_TOKENS,
) -> list[list[list[int]] | str]:
    """Tokens of the answers by load and task, without the end token; or the error of a load.

    Args:
        bundles: The folder that holds the bundles.
        loads: Name of a bundle, and the options of `from_pretrained`.
        tasks: What to ask.
        folder: For files that both sides read.
        max_new_tokens: Tokens of an answer, at most.
    """
    output = folder / "answers.json"
    first = bundles / loads[0][0]
    job = {
        "models": f"{bundles}/",
        "loads": [{"name": name, "options": options} for name, options in loads],
        "tasks": plain_tasks(tasks, first, folder),
        "max_new_tokens": max_new_tokens,
        "output": str(output),
    }
    run_node("transformers_js.mjs", json.dumps(job))
    results = json.loads(output.read_text())["results"]
    return [result.get("error") or without_ends(result["answers"], first) for result in results]


def ask_ours(
    bundle: Path,
    tasks: Sequence[Task],
    max_new_tokens: int = NEW_TOKENS,
    precision: Precision | None = None,
) -> list[list[int]]:
    """Tokens of the answers of `run`, without the end token; `precision` is as `load_bundle` has it."""
    model = load_bundle(bundle, "onnx", precision)
    answers = []
    for task in tasks:
        prompt = model.prompt(task.question, [load_image(task.image)] if task.image else [])
        answers.append(list(generate(model.session, prompt, model.eos_token_ids, max_new_tokens).token_ids))
    return answers


def plain_tasks(tasks: Sequence[Task], bundle: Path, folder: Path) -> list[dict[str, str]]:
    """Tasks as our scripts take them; pixels are written into a folder."""
    return [_plain(task, bundle, folder / f"pixels{index}.f32") for index, task in enumerate(tasks)]


def _plain(task: Task, bundle: Path, file: Path) -> dict[str, str]:
    plain = {"question": task.question}
    if task.image:
        plain["image"] = str(task.image)
        if task.is_prepared and not takes_pictures(load_manifest(bundle).artifact("onnx", "vision")):
            file.write_bytes(_pixels(bundle, task.image).astype("<f4").tobytes())
            plain["pixels"] = str(file)
    return plain


def _pixels(bundle: Path, image: Path) -> np.ndarray:
    """A picture as a bundle's encoder takes it, float32 [1, 3, S, S]."""
    images = load_manifest(bundle).contract.images
    return pixel_values(load_image(image), images)


def without_ends(answers: Sequence[list[int]], bundle: Path) -> list[list[int]]:
    """Answers without the token at which a bundle's model ends them, if it did."""
    ends = json.loads((bundle / "generation_config.json").read_text())["eos_token_id"]
    return [ids[:-1] if ids and ids[-1] in ends else ids for ids in answers]
