"""Endless training batches, by seed: scenes, pictures, dense labels and packed questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from style import DEMO, Style
from text import Packer, QuestionSource, Row
from torch import Tensor

from fastvlm_convert.demo.draw import Draw
from fastvlm_convert.demo.questions import Question
from fastvlm_convert.demo.samples import HELD_OUT_SEED

# Scenes of one run take consecutive seeds from here on, far below the held-out ones.
SEEDS_PER_RUN = 10_000_000


@dataclass(frozen=True)
class Batch:
    """Tensors of B pictures, each with one packed row of S tokens."""

    labels: Tensor
    """(B, 16, fields) int64."""
    ids: Tensor
    targets: Tensor
    segments: Tensor
    positions: Tensor
    """(B, S) int64 each."""
    pixels: Tensor | None
    """(B, 3, 256, 256) float32 in [0, 1], channels last, if pictures were asked for."""

    @property
    def mask(self) -> Tensor:
        """(B, 1, S, S) bool: a token sees the prefix and the earlier part of its segment."""
        return attention_mask(self.segments)


def attention_mask(segments: Tensor) -> Tensor:
    """The block mask of rows with these segments (B, S)."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    return (causal & ((key == 0) | (key == query)))[:, None]


def to_pixels(images: list[Image.Image], size: int = 256) -> Tensor:
    """Pad pictures to squares with black, resize, and stack them as (B, 3, size, size)."""
    arrays = []
    for image in images:
        side = max(image.size)
        square = Image.new("RGB", (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        arrays.append(np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)))
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return pixels.float().div_(255).contiguous(memory_format=torch.channels_last)


def make_batch(scenes: list[Any], rows: list[Row], with_pixels: bool, style: Style = DEMO) -> Batch:
    """Stack scenes and their rows."""
    return Batch(
        labels=torch.from_numpy(np.stack([style.labels(scene) for scene in scenes])),
        ids=torch.from_numpy(np.stack([row.ids for row in rows])),
        targets=torch.from_numpy(np.stack([row.targets for row in rows])),
        segments=torch.from_numpy(np.stack([row.segments for row in rows])),
        positions=torch.from_numpy(np.stack([row.positions for row in rows])),
        pixels=to_pixels([style.render(scene) for scene in scenes]) if with_pixels else None,
    )


class TrainingStream:
    """Batches of fresh scenes; `position` says where to resume after an interruption."""

    def __init__(
        self,
        packer: Packer,
        source: QuestionSource,
        seed: int,
        worker: int = 0,
        num_workers: int = 1,
        style: Style = DEMO,
    ) -> None:
        """Start at the first scene of one worker of the run with this seed."""
        if not 0 <= seed < HELD_OUT_SEED // SEEDS_PER_RUN:
            raise ValueError(f"seed must be below {HELD_OUT_SEED // SEEDS_PER_RUN}, got {seed}")
        self._packer, self._source, self._style = packer, source, style
        self._first = seed * SEEDS_PER_RUN + worker
        self._stride = num_workers
        self.position = 0

    def next_batch(self, size: int, with_pixels: bool) -> Batch:
        """The next `size` scenes; workers take turns."""
        scenes, rows = [], []
        for _ in range(size):
            draw = Draw(self._first + self.position * self._stride)
            self.position += 1
            scene = self._style.make(draw)
            scenes.append(scene)
            rows.append(self._packer.pack(self._source.draw(scene, draw))[0])
        return make_batch(scenes, rows, with_pixels, self._style)


@dataclass(frozen=True)
class EvaluationRow:
    """One packed row of held-out questions."""

    picture: int
    row: Row
    questions: list[Question]


@dataclass(frozen=True)
class HeldOut:
    """The held-out pictures, and all their questions in packed rows."""

    scenes: list[Any]
    rows: list[EvaluationRow]
    style: Style


def held_out_rows(packer: Packer, count: int, style: Style = DEMO) -> HeldOut:
    """The first `count` held-out pictures; of the demo the same as `fastvlm_convert.demo.held_out`."""
    scenes, rows = [], []
    for index in range(count):
        draw = Draw(HELD_OUT_SEED + index)
        scene = style.make(draw)
        scenes.append(scene)
        left = style.ask_all(scene, draw)
        while left:
            asked = left
            row, left = packer.pack(asked)
            rows.append(EvaluationRow(index, row, [q for q in asked if q not in left]))
    return HeldOut(scenes, rows, style)
