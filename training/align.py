"""Train a projector from the demo's encoder onto a language model that was never trained here, on a CPU.

    make real-model && python -m benchmarks.real_model FOLDER
    python training/align.py FOLDER

Encoder and language model stay as they are. The features of all pictures are computed once. First the
projected tokens learn to be the words that their cell spells; then the language model answers questions about
them, and its gradients train the projector. After an interruption, the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from frozen import FrozenReader, Packer, Row
from plain_english import Spelling, questions
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from workers import Worker, run_workers

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.demo.draw import Draw
from fastvlm_convert.demo.questions import ask_all
from fastvlm_convert.demo.render import render
from fastvlm_convert.demo.samples import HELD_OUT_SEED
from fastvlm_convert.demo.scene import make_scene
from fastvlm_convert.model.fastvlm import FastVLM, load_model
from fastvlm_convert.model.projector import Projector
from fastvlm_convert.preprocess import pixel_values

log = logging.getLogger("align")

OUTPUT = Path(__file__).parent / "real_model_projector.safetensors"
# Scenes of one run take consecutive seeds from here on, far below the held-out ones.
SEEDS_PER_RUN = 10_000_000
# Seconds of the whole run that go to spelling, as a share.
SPELLING = 0.1
SPELLING_RATE, READING_RATE, BATCH, SPELLING_BATCH = 1e-3, 1e-3, 2, 64
SHARPNESS = 16.0  # of the cosines among which the right word must win
_SAVE_SECONDS, _EVALUATE_SECONDS, _LOG_STEPS = 120, 600, 25


@dataclass(frozen=True)
class Pictures:
    """Features of pictures by seed: float32 [n, 16, C], and the rows that they spell, int64 [n, 16]."""

    seeds: tuple[int, ...]
    features: Tensor
    labels: Tensor


def features_of(model: FastVLM, folder: Path, seeds: range) -> Tensor:
    """What the encoder sees in the pictures of some seeds, float32 [n, 16, C]."""
    settings = open_checkpoint(folder).pictures.image
    found = []
    for start in range(0, len(seeds), 32):
        images = [render(make_scene(Draw(seed))) for seed in seeds[start : start + 32]]
        pixels = torch.from_numpy(np.concatenate([pixel_values(image, settings) for image in images]))
        with torch.no_grad():
            found.append(model.vision(pixels))
    return torch.cat(found)


def prepare(args: argparse.Namespace) -> None:
    """Write the features of the run's pictures and of the held-out ones, unless they are there."""
    path = args.work / "features.pt"
    if path.exists():
        return
    checkpoint = open_checkpoint(args.folder)
    model = load_model(checkpoint.config, checkpoint.weights)
    first = args.seed * SEEDS_PER_RUN
    ranges = {
        "train": range(first, first + args.pictures),
        "held_out": range(HELD_OUT_SEED, HELD_OUT_SEED + args.held_out),
    }
    started = time.monotonic()
    kept = {name: features_of(model, args.folder, seeds).half() for name, seeds in ranges.items()}
    save_whole(kept, path)
    log.info("features of %d pictures: %.1f minutes", sum(map(len, ranges.values())),
             (time.monotonic() - started) / 60)  # fmt: skip


def pictures(features: Tensor, first: int, spelling: Spelling) -> Pictures:
    """Features with their seeds and labels."""
    seeds = tuple(range(first, first + len(features)))
    labels = np.stack([spelling.labels(make_scene(Draw(seed))) for seed in seeds])
    return Pictures(seeds, features.float(), torch.from_numpy(labels))


def spelling_loss(tokens: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, float]:
    """Distance of projected tokens (n, D) to the words they spell, and the share that is nearest to them."""
    distance = F.mse_loss(tokens, rows[labels]) / rows.square().mean()
    cosines = F.normalize(tokens, dim=-1) @ F.normalize(rows, dim=-1).T
    right = (cosines.argmax(-1) == labels).float().mean().item()
    return distance + F.cross_entropy(SHARPNESS * cosines, labels), right


class Aligner:
    """The projector in training, with all that it is trained on."""

    def __init__(self, args: argparse.Namespace, worker: Worker) -> None:
        """Load the language model and the features."""
        self.args, self.worker = args, worker
        checkpoint = open_checkpoint(args.folder)
        model = load_model(checkpoint.config, checkpoint.weights)
        tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
        self.packer = Packer(tokenizer)
        self.reader = FrozenReader(model.decoder, self.packer.prefix)
        self.spelling = Spelling(tokenizer, model.decoder.embed_tokens.weight)
        kept = torch.load(args.work / "features.pt", weights_only=True)
        self.train = pictures(kept["train"], args.seed * SEEDS_PER_RUN, self.spelling)
        self.held_out = pictures(kept["held_out"], HELD_OUT_SEED, self.spelling)
        torch.manual_seed(args.seed)
        self.projector = Projector(model.projector.fc1.in_features, model.projector.fc1.out_features,
                                   model.projector.fc2.out_features)  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.projector.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        self.elapsed, self.step = 0.0, 0

    def resume(self) -> None:
        """Continue from the saved state, if there is one."""
        path = self.args.work / "align.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.projector.load_state_dict(state["projector"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.elapsed, self.step = state["elapsed"], state["step"]

    def save(self) -> None:
        """Keep the state."""
        if self.worker.is_first:
            state = {"projector": self.projector.state_dict(), "optimizer": self.optimizer.state_dict()}
            save_whole(state | {"elapsed": self.elapsed, "step": self.step}, self.args.work / "align.pt")

    def spell(self) -> None:
        """Teach the projected tokens their words."""
        end = 60 * self.args.minutes * SPELLING
        draw = torch.Generator().manual_seed(self.args.seed + self.worker.rank)
        step = 0
        while self.elapsed < end:
            started = time.monotonic()
            chosen = torch.randint(len(self.train.seeds), (SPELLING_BATCH,), generator=draw)
            tokens = self.projector(self.train.features[chosen]).flatten(0, 1)
            loss, right = spelling_loss(tokens, self.train.labels[chosen].flatten(), self.spelling.rows)
            self.update(loss, SPELLING_RATE * cosine(self.elapsed / end, 0.1) * min(1, (step + 1) / 50))
            step += 1
            self.elapsed += self.worker.average_value(time.monotonic() - started)
            if step % 200 == 0:
                log.info("spelling step %d loss %.3f right %.3f", step, loss.item(), right)
        self.save()
        with torch.no_grad():
            tokens = self.projector(self.held_out.features).flatten(0, 1)
            _, right = spelling_loss(tokens, self.held_out.labels.flatten(), self.spelling.rows)
        log.info("spelling: %d steps, %.3f of the held-out tokens spell their word", step, right)

    def read(self) -> None:
        """Teach the projected tokens what the language model needs to answer."""
        begin, end = 60 * self.args.minutes * SPELLING, 60 * self.args.minutes
        saved = evaluated = self.elapsed
        sums: Counter[str] = Counter()
        while self.elapsed < end:
            started = time.monotonic()
            progress = (self.elapsed - begin) / (end - begin)
            numbers = self.batch()
            rows = [self.row(self.train.seeds[n]) for n in numbers]
            tokens = self.projector(self.train.features[numbers])
            scores = self.reader(tokens, rows)
            text = F.cross_entropy(scores.logits, scores.targets)
            spelled, right = spelling_loss(
                tokens.flatten(0, 1), self.train.labels[numbers].flatten(), self.spelling.rows
            )
            aid = max(0.0, 0.3 * (1 - 2 * progress))
            rate = READING_RATE * cosine(progress, 0.0) * min(1.0, (self.step + 1) / 30)
            self.update(text + aid * spelled, rate)
            self.step += 1
            seconds = self.worker.average_value(time.monotonic() - started)
            self.elapsed += seconds
            token = (scores.logits.detach().argmax(-1) == scores.targets).float().mean().item()
            for name, value in (("text", text.item()), ("token", token), ("spelled", right), ("s", seconds)):
                sums[name] += value / _LOG_STEPS
            if self.step % _LOG_STEPS == 0:
                line = " ".join(f"{name} {value:.3f}" for name, value in sums.items())
                log.info("step %d min %.1f %s", self.step, self.elapsed / 60, line)
                sums.clear()
            if self.elapsed - saved > _SAVE_SECONDS:
                self.save()
                saved = self.elapsed
            if self.elapsed - evaluated > _EVALUATE_SECONDS:
                self.log_accuracy(30)
                evaluated = self.elapsed
        self.save()

    def batch(self) -> list[int]:
        """The pictures of this step; workers take turns."""
        first = (self.step * self.worker.count + self.worker.rank) * BATCH
        return [(first + n) % len(self.train.seeds) for n in range(BATCH)]

    def row(self, seed: int) -> Row:
        """Questions about a picture, others each time it comes round."""
        draw = Draw(SEEDS_PER_RUN * (self.args.seed + 1) + seed + self.step)
        return self.packer.pack(questions(make_scene(Draw(seed)), draw))[0]

    def update(self, loss: Tensor, rate: float) -> None:
        """One step of the optimizer, on the mean over all workers."""
        self.optimizer.zero_grad()
        loss.backward()
        self.worker.average(p.grad for p in self.projector.parameters() if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(self.projector.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def log_accuracy(self, count: int) -> dict[str, tuple[int, int]]:
        """Exact answers by kind on held-out pictures; every worker waits for the first."""
        found = accuracy(self, count) if self.worker.is_first else {}
        if found:
            log.info("held out: %s", summary(found))
        return found


@torch.no_grad()
def accuracy(aligner: Aligner, count: int) -> dict[str, tuple[int, int]]:
    """Questions about held-out pictures by kind: those answered word for word, and all.

    Greedy decoding says an answer if and only if each of its tokens is the likeliest after those before.
    """
    right, asked = Counter[str](), Counter[str]()
    for number, row in held_out_rows(aligner, count):
        tokens = aligner.projector(aligner.held_out.features[number : number + 1])
        scores = aligner.reader(tokens, [row])
        wrong = scores.logits.argmax(-1) != scores.targets
        answered = torch.from_numpy(row.segments[row.targets >= 0])
        for index, question in enumerate(row.questions, start=1):
            asked[question.kind] += 1
            right[question.kind] += not wrong[answered == index].any()
    return {kind: (right[kind], asked[kind]) for kind in asked}


def held_out_rows(aligner: Aligner, count: int) -> Iterator[tuple[int, Row]]:
    """The generator's questions about held-out pictures, packed."""
    for number, seed in enumerate(aligner.held_out.seeds[:count]):
        draw = Draw(seed)
        left = list(ask_all(make_scene(draw), draw))
        while left:
            row, left = aligner.packer.pack(left)
            yield number, row


def summary(found: dict[str, tuple[int, int]]) -> str:
    """One line with the share of each kind."""
    total = sum(r for r, _ in found.values()) / sum(n for _, n in found.values())
    return f"all {total:.3f} | " + " ".join(f"{kind} {r / n:.2f}" for kind, (r, n) in found.items())


def cosine(progress: float, final: float) -> float:
    """From 1 to a final share."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def write(aligner: Aligner) -> None:
    """Write the projector as float16 under Apple's names, with its provenance and its accuracy."""
    args = aligner.args
    aligner.projector.half().float()
    found = accuracy(aligner, args.held_out)
    log.info("written: %s", summary(found))
    names = {"fc1": "model.mm_projector.0", "fc2": "model.mm_projector.2"}
    tensors = {
        f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value.half().contiguous()
        for name, value in aligner.projector.state_dict().items()
    }
    provenance = {
        "command": f"python training/align.py FOLDER --minutes {args.minutes:g} --seed {args.seed}"
        f" --pictures {args.pictures}",
        "minutes": f"{aligner.elapsed / 60:.1f}",
        "steps": str(aligner.step),
        "rows_read": str(aligner.step * BATCH * aligner.worker.count),
        "held_out_pictures": str(args.held_out),
        "exact_answers": json.dumps({kind: list(pair) for kind, pair in found.items()}),
        "format": "pt",
    }
    save_file(tensors, args.output, metadata=provenance)


def save_whole(state: object, path: Path) -> None:
    """Write a file that is there whole or not at all."""
    staging = path.with_suffix(".partial")
    torch.save(state, staging)
    staging.replace(path)


def train(args: argparse.Namespace, worker: Worker) -> None:
    """What every worker does."""
    log_to_stderr(worker.is_first)
    torch.set_num_threads(1)
    aligner = Aligner(args, worker)
    aligner.resume()
    aligner.spell()
    aligner.read()
    if worker.is_first:
        write(aligner)


def log_to_stderr(loud: bool) -> None:
    """Log with times."""
    level = logging.INFO if loud else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the checkpoint that benchmarks/real_model.py wrote")
    parser.add_argument("--minutes", type=float, default=45.0, help="of training, pictures not included")
    parser.add_argument("--seed", type=int, default=95, help="below 100; other seed, other pictures")
    parser.add_argument("--pictures", type=int, default=2500)
    parser.add_argument("--held-out", type=int, default=200, help="pictures that measure the result")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fastvlm-align")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    log_to_stderr(loud=True)
    torch.set_num_threads(1)
    prepare(args)
    run_workers(args.workers, partial(train, args))


if __name__ == "__main__":
    main()
