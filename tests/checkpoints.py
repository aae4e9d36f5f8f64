"""The golden sets, writable copies of their checkpoints, and the means to change those."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.model.fastvlm import FastVLM, load_model
from fastvlm_convert.weights.fold import fold

torch.set_num_threads(1)  # on tensors this small, several threads mostly wait for each other

DATA = Path(__file__).parent / "data"
GOLDEN, CASES = DATA / "golden", DATA / "cases"
LLAVA, HF, SHARDED = SETS = ("tiny-llava", "tiny-hf", "tiny-llava-sharded")
APPLE_VISION = "model.vision_tower.vision_tower.model."
TIMM_VISION = "model.vision_tower.timm_model."


@dataclass(frozen=True)
class GoldenCase:
    """One picture and question with everything the original code computed for them."""

    name: str
    index: int
    image: Path
    question: str
    ids_before_image: list[int]
    ids_after_image: list[int]
    greedy_token_ids: list[int]
    greedy_text: str

    def array(self, key: str) -> np.ndarray | None:
        """The golden array `key`, or None where this set has none."""
        with np.load(GOLDEN / self.name / "golden.npz") as arrays:
            full = f"case{self.index}.{key}"
            return arrays[full] if full in arrays.files else None

    def __str__(self) -> str:
        return f"{self.name}-{self.index}"


def golden_cases() -> list[GoldenCase]:
    """All cases of all sets."""
    keys = ("question", "ids_before_image", "ids_after_image", "greedy_token_ids", "greedy_text")
    return [
        GoldenCase(name, i, GOLDEN / name / case["image"], **{key: case[key] for key in keys})
        for name in SETS
        for i, case in enumerate(json.loads((GOLDEN / name / "golden.json").read_text())["cases"])
    ]


@cache
def golden_checkpoint(name: str) -> Checkpoint:
    """A golden checkpoint, opened in place."""
    return open_checkpoint(GOLDEN / name / "checkpoint")


@cache
def golden_model(name: str, folded: bool = False) -> FastVLM:
    """The reference with a golden checkpoint's weights."""
    checkpoint = golden_checkpoint(name)
    return load_model(checkpoint.config, fold(checkpoint.weights) if folded else checkpoint.weights, folded)


def open_model(folder: Path) -> FastVLM:
    """The reference with the weights of the checkpoint in `folder`."""
    checkpoint = open_checkpoint(folder)
    return load_model(checkpoint.config, checkpoint.weights)


def copy_checkpoint(name: str, folder: Path) -> Path:
    """A writable copy of a golden checkpoint."""
    return Path(shutil.copytree(GOLDEN / name / "checkpoint", folder / name))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All stored tensors, read by the safetensors package."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def remove_weights(folder: Path) -> None:
    """Delete weights and index."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json"), *folder.glob("*.bin")]:
        path.unlink()


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace a checkpoint's weights."""
    remove_weights(folder)
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def edit_tensors(
    folder: Path, changes: dict[str, torch.Tensor] | None = None, remove: Iterable[str] = ()
) -> None:
    """Change, add or remove tensors of a checkpoint."""
    tensors = read_tensors(folder) | (changes or {})
    write_tensors(folder, {k: v for k, v in tensors.items() if k not in set(remove)})


def edit_json(path: Path, changes: dict[str, Any] | None = None, remove: Iterable[str] = ()) -> None:
    """Change, add or remove keys of a JSON object."""
    values = json.loads(path.read_text()) | (changes or {})
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in set(remove)}))


def tree_state(folder: Path) -> dict[str, tuple[str, int]]:
    """Content hash and modification time of every file below `folder`."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
