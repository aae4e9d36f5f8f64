"""Train the demo checkpoint from generated pictures, on a CPU, and export it.

    python training/train_demo.py                      # all phases, then export
    python training/train_demo.py --phase vision       # one phase (vision and decoder may overlap)
    python training/train_demo.py --from checkpoints/fastvlm-demo --seed 1 --minutes 15 --output DIR

After an interruption, the same command resumes. Phases: `vision` learns dense labels, `decoder`
answers questions about symbols that stand in for image tokens, `projector` maps one to the other, and
`joint` trains everything together.
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from checkpoint import (
    FoldedModel,
    count_parameters,
    load_apple_names,
    read_weights,
    round_to_half,
    write_checkpoint,
)
from data import Batch, TrainingStream, held_out_rows
from evaluate import exact_match, summary
from model import DemoModel, Losses
from network import NetworkConfig, fold
from report import PhaseRecord, write_readme
from text import Packer, QuestionSource, train_tokenizer
from torch import nn
from workers import Worker, run_workers

from fastvlm_convert.demo import write_check_images

log = logging.getLogger("train_demo")

LossFunction = Callable[[Batch, float], Losses]

REPOSITORY = Path(__file__).parent.parent
NUM_HELD_OUT = 500
DEFAULT_MINUTES = {"vision": 25.0, "decoder": 30.0, "projector": 2.0, "joint": 50.0}
# Phase -> earlier phase -> the parts it takes from there.
PHASE_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "vision": {},
    "decoder": {},
    "projector": {"vision": ("vision", "heads"), "decoder": ("decoder", "symbols", "facts")},
    "joint": {"projector": ("vision", "heads", "projector", "decoder", "symbols", "facts")},
}

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

    def __init__(self, model: DemoModel, packer: Packer, work: Path, worker: Worker) -> None:
        """Keep what does not depend on the phase."""
        self.model, self.packer, self.work, self.worker = model, packer, work, worker
        self._source = QuestionSource(packer.tokenizer)
        self._held_out = held_out_rows(packer, 100)

    def run(self, phase: Phase, seed: int) -> None:
        """Train one phase to its end, resuming from a saved state if there is one."""
        optimizer = make_optimizer(phase.trained)
        parameters = [p for module in phase.trained for p in module.parameters()]
        stream = TrainingStream(self.packer, self._source, seed, self.worker.rank, self.worker.count)
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


def make_phase(model: DemoModel, name: str, minutes: float) -> Phase:
    """One of the four phases."""
    sight = (model.vision, model.heads)
    language = (model.decoder, model.symbols, model.facts)

    def vision(batch: Batch, _: float) -> Losses:
        return model.vision_loss(batch)

    def decoder(batch: Batch, _: float) -> Losses:
        return model.decoder_loss(batch)

    def projector(batch: Batch, _: float) -> Losses:
        return model.projector_loss(batch)

    def joint(batch: Batch, progress: float) -> Losses:
        return model.joint_loss(batch, aids=max(0.05, 1 - 1.5 * progress))

    everything = (*sight, model.projector, *language)
    phases = (
        Phase("vision", minutes, 2e-3, 0.2, 16, True, sight, vision),
        Phase("decoder", minutes, 1e-3, 0.2, 16, False, language, decoder),
        Phase("projector", minutes, 2e-3, 0.05, 16, True, (model.projector,), projector),
        Phase("joint", minutes, 1e-3, 0.0, 16, True, everything, joint),
    )
    return next(phase for phase in phases if phase.name == name)


def continue_phase(model: DemoModel, minutes: float, seed: int) -> Phase:
    """A gentle phase for a finished checkpoint: answers only, one cosine to zero."""

    def answers(batch: Batch, _: float) -> Losses:
        return model.text_loss(batch, model.image_tokens(batch))

    trained = (model.vision, model.projector, model.decoder)
    return Phase(f"continue-{seed}", minutes, 3e-4, 0.0, 16, True, trained, answers)


def load_parts(model: DemoModel, work: Path, parts: dict[str, tuple[str, ...]]) -> None:
    """Take parts of the model from the saved states of earlier phases."""
    for phase, names in parts.items():
        state = torch.load(work / f"{phase}.pt", weights_only=True)["model"]
        for name in names:
            start = name + "."
            part = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            getattr(model, name).load_state_dict(part)


def history(work: Path) -> list[PhaseRecord]:
    """What the phases in a folder have taken so far, in the order in which they ended."""
    records = []
    for path in sorted(work.glob("*.pt"), key=lambda path: path.stat().st_mtime):
        state = torch.load(path, weights_only=True)
        records.append(PhaseRecord(path.stem, state["elapsed"] / 60, state["step"], state["pictures"]))
    return records


def export(model: DemoModel, config: NetworkConfig, packer: Packer, args: argparse.Namespace) -> None:
    """Write the checkpoint with its README, check pictures and license; measure it on 500 pictures."""
    folded = round_to_half(FoldedModel(model.vision, model.projector, model.decoder)).eval()
    result = exact_match(
        folded.decoder,
        lambda batch: folded.projector(folded.vision(batch.pixels)),
        held_out_rows(packer, NUM_HELD_OUT),
        len(packer.system),
    )
    log.info("exported: %s", summary(result))
    staging = args.output.with_name(args.output.name + ".partial")
    write_checkpoint(staging, folded, config, packer.tokenizer)
    readme = write_readme(
        config, count_parameters(folded), result, NUM_HELD_OUT, history(args.work), args.source
    )
    (staging / "README.md").write_text(readme, encoding="utf-8")
    write_check_images(staging / "check_images")
    shutil.copy(REPOSITORY / "LICENSE", staging)
    replace_files(staging, args.output)


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


def train(args: argparse.Namespace, worker: Worker) -> None:
    """What every worker does."""
    level = logging.INFO if worker.is_first else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    config = NetworkConfig(vocab_size=tokenizer.get_vocab_size())
    packer = Packer(tokenizer)
    model = DemoModel(config, tokenizer)
    # From here on, workers differ in their random noise.
    torch.manual_seed(1000 * args.seed + worker.rank)
    trainer = Trainer(model, packer, args.work, worker)
    if args.source is not None:
        fold(model)
        load_apple_names(model, read_weights(args.source))
        trainer.run(continue_phase(model, args.minutes or 15.0, args.seed), args.seed)
    for name in chosen_phases(args):
        load_parts(model, args.work, PHASE_PARTS[name])
        minutes = args.minutes or DEFAULT_MINUTES[name]
        # Every phase draws other pictures.
        trainer.run(make_phase(model, name, minutes), args.seed + list(PHASE_PARTS).index(name))
    if worker.is_first and (args.source is not None or "joint" in chosen_phases(args)):
        export(model, config, packer, args)


def chosen_phases(args: argparse.Namespace) -> list[str]:
    """The phases that the command line asks for."""
    if args.source is not None:
        return []
    return [args.phase] if args.phase else list(PHASE_PARTS)


def main() -> None:
    """Parse the command line and train."""
    args = _parse()
    args.work.mkdir(parents=True, exist_ok=True)
    # An orderly exit also ends the workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    run_workers(args.workers, partial(train, args))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phase", choices=PHASE_PARTS, help="train this phase only")
    parser.add_argument("--minutes", type=float, help="length of each phase")
    parser.add_argument("--from", dest="source", type=Path, help="continue from this checkpoint")
    parser.add_argument("--seed", type=int, default=1, help="below 90; other seed, other pictures")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    folder = Path(tempfile.gettempdir()) / "fastvlm-demo"
    parser.add_argument("--work", type=Path, default=folder, help="where training state is kept")
    output = REPOSITORY / "checkpoints" / "fastvlm-demo"
    parser.add_argument("--output", type=Path, default=output, help="where the checkpoint goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
