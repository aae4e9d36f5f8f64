"""The loop of every training: batches, schedule, saved states, evaluation."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from data import Batch, TrainingStream, held_out_rows
from evaluate import exact_match, summary
from model import AnsweringModel, Losses
from report import PhaseRecord
from style import DEMO, Style
from text import Packer, QuestionSource
from torch import nn
from workers import Worker

log = logging.getLogger("training")

LossFunction = Callable[[Batch, float], Losses]

_SAVE_SECONDS = 120
_EVALUATE_SECONDS = 480
_LOG_STEPS = 50


@dataclass(frozen=True)
class Phase:
    """How one part of the training runs; `loss` takes a batch and the progress in [0, 1]."""

    name: str
    minutes: float
    learning_rate: float
    final_share: float
    """Learning rate at the end of the cosine, as a share of the peak."""
    batch_size: int
    with_pixels: bool
    trained: tuple[nn.Module, ...]
    loss: LossFunction

    @property
    def evaluated(self) -> bool:
        """Whether the phase learns to answer."""
        return self.name not in ("vision", "projector")


def learning_rate(phase: Phase, progress: float, step: int) -> float:
    """Linear warm-up over 100 steps, then a cosine over the minutes of the phase."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    share = phase.final_share + (1 - phase.final_share) * cosine
    return phase.learning_rate * share * min(1.0, (step + 1) / 100)


def make_optimizer(modules: tuple[nn.Module, ...]) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and kernels only."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


class Trainer:
    """Runs phases of one model and keeps their state in a folder."""

    def __init__(
        self, model: AnsweringModel, packer: Packer, work: Path, worker: Worker, style: Style = DEMO
    ) -> None:
        """Keep what does not depend on the phase."""
        self.model, self.packer, self.work, self.worker = model, packer, work, worker
        self._source, self._style = QuestionSource(packer.tokenizer, style), style
        self._held_out = held_out_rows(packer, 100, style)

    def run(self, phase: Phase, seed: int) -> None:
        """Train one phase to its end, resuming from a saved state if there is one."""
        optimizer = make_optimizer(phase.trained)
        parameters = [p for module in phase.trained for p in module.parameters()]
        stream = TrainingStream(
            self.packer, self._source, seed, self.worker.rank, self.worker.count, self._style
        )
        path = self.work / f"{phase.name}.pt"
        step, elapsed = 0, 0.0
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, elapsed, stream.position = state["step"], state["elapsed"], state["position"]
        log.info("%s: at %.1f of %.1f minutes", phase.name, elapsed / 60, phase.minutes)

        def save() -> None:
            self.worker.average_buffers(self.model)
            if not self.worker.is_first:
                return
            state = {"model": self.model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "elapsed": elapsed, "position": stream.position}
            state["pictures"] = step * phase.batch_size
            _save_whole(state, path)

        last_save = last_evaluation = elapsed
        totals: dict[str, float] = {}
        self.model.train()
        while elapsed < 60 * phase.minutes:
            start = time.monotonic()
            progress = elapsed / (60 * phase.minutes)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(phase, progress, step)
            batch = stream.next_batch(phase.batch_size // self.worker.count, phase.with_pixels)
            loss, metrics = phase.loss(batch, progress)
            loss.backward()
            self.worker.average(p.grad for p in parameters if p.grad is not None)
            for module in phase.trained:
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            self.model.zero_grad(set_to_none=True)
            step += 1
            # All workers must agree on the time, or one would finish before the others.
            seconds = self.worker.average_value(time.monotonic() - start)
            elapsed += seconds
            for name, value in (metrics | {"seconds": seconds}).items():
                totals[name] = totals.get(name, 0.0) + value / _LOG_STEPS
            if step % _LOG_STEPS == 0:
                line = " ".join(f"{name} {value:.3f}" for name, value in totals.items())
                log.info("%s step %d min %.1f %s", phase.name, step, elapsed / 60, line)
                totals = {}
            if elapsed - last_save > _SAVE_SECONDS:
                save()
                last_save = elapsed
            if elapsed - last_evaluation > _EVALUATE_SECONDS:
                self.evaluate(phase)
                last_evaluation = elapsed
        save()
        self.evaluate(phase)

    def evaluate(self, phase: Phase) -> None:
        """Log the accuracy on some held-out pictures, if the phase learns to answer."""
        self.worker.average_buffers(self.model)
        if not (phase.evaluated and self.worker.is_first):
            return
        self.model.eval()
        tokens = self.model.image_tokens if phase.with_pixels else self.model.symbol_tokens
        system_length = len(self.packer.system)
        result = exact_match(self.model.decoder, tokens, self._held_out, system_length, phase.with_pixels)
        self.model.train()
        log.info("%s held out: %s", phase.name, summary(result))


def history(work: Path) -> list[PhaseRecord]:
    """What the phases in a folder have taken so far, in the order in which they ended."""
    records = []
    for path in sorted(work.glob("*.pt"), key=lambda path: path.stat().st_mtime):
        state = torch.load(path, weights_only=True)
        records.append(PhaseRecord(path.stem, state["elapsed"] / 60, state["step"], state["pictures"]))
    return records


def replace_files(source: Path, target: Path) -> None:
    """Move all files of a folder into another, each atomically; files that only the other has stay."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            destination = target / path.relative_to(source)
            destination.parent.mkdir(parents=True, exist_ok=True)
            path.replace(destination)
    shutil.rmtree(source)


def _save_whole(state: dict, path: Path) -> None:
    staging = path.with_suffix(".partial")
    torch.save(state, staging)
    staging.replace(path)
