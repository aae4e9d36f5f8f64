"""Train the checkpoint of the unseen style from generated boards, on a CPU, and export it.

    python training/train_unseen.py                    # 35 minutes, then the checkpoint

Its pictures share nothing with those that calibrate by default, so it shows what a calibration is worth on a
model whose pictures nobody has. After an interruption, the same command resumes.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from checkpoint import FoldedModel, count_parameters, round_to_half, write_checkpoint
from data import Batch, held_out_rows
from evaluate import exact_match, summary
from model import AnsweringModel, Losses, relative_distance
from network import NetworkConfig
from report import write_unseen_readme
from style import UNSEEN
from text import Packer, train_tokenizer
from trainer import Phase, Trainer, history, replace_files
from workers import Worker, run_workers

log = logging.getLogger("training")

REPOSITORY = Path(__file__).parent.parent
NUM_HELD_OUT = 500
SEED = 60  # of the pictures; training on the demo's scenes uses lower ones
MEETING = 0.4  # share of the training after which the answers come from pictures
_SYMBOL_NOISE = 0.05


def network_config(vocab_size: int) -> NetworkConfig:
    """Sizes of the network: every width of its matrices divides into blocks of 32, most into 128."""
    return NetworkConfig(
        widths=(32, 32, 64, 128, 128),
        depths=(1, 1, 2, 1, 1),
        vocab_size=vocab_size,
        hidden=256,
        intermediate=256,
        layers=3,
        heads=8,
        kv_heads=2,
    )


def loss_of(model: AnsweringModel, batch: Batch, progress: float) -> Losses:
    """See and talk first, then meet: dense labels and answers from symbols, then answers from pictures."""
    features = model.vision(batch.pixels)
    tokens, symbols = model.projector(features), model.symbol_tokens(batch)
    dense, _ = model.heads.losses(features, batch.labels)
    distance = relative_distance(tokens, symbols.detach())
    if progress < MEETING:
        noisy = symbols + _SYMBOL_NOISE * torch.randn_like(symbols)
        (text, metrics), _ = model.answer_loss(batch, noisy)
        loss = text + dense.sum() + distance
    else:
        (text, metrics), _ = model.answer_loss(batch, tokens)
        aids = max(0.05, 1 - 1.5 * (progress - MEETING) / (1 - MEETING))
        loss = text + aids * (0.3 * dense.sum() + distance)
    return loss, metrics | {"dense": dense.sum().item(), "distance": distance.item()}


def train(args: argparse.Namespace, worker: Worker) -> None:
    """What every worker does."""
    level = logging.INFO if worker.is_first else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(style=UNSEEN)
    config, packer = network_config(tokenizer.get_vocab_size()), Packer(tokenizer)
    model = AnsweringModel(config, tokenizer, UNSEEN.fields)
    torch.manual_seed(1000 * args.seed + worker.rank)
    trained = (model.vision, model.projector, model.decoder, model.heads, model.symbols)
    phase = Phase("joint", args.minutes, 1.5e-3, 0.0, 16, True, trained, partial(loss_of, model))
    trainer = Trainer(model, packer, args.work, worker, UNSEEN)
    trainer.run(phase, args.seed)
    if worker.is_first:
        export(model, config, packer, args)


def export(model: AnsweringModel, config: NetworkConfig, packer: Packer, args: argparse.Namespace) -> None:
    """Write the checkpoint with its README and license; measure it on held-out pictures."""
    folded = round_to_half(FoldedModel(model.vision, model.projector, model.decoder)).eval()
    result = exact_match(
        folded.decoder,
        lambda batch: folded.projector(folded.vision(batch.pixels)),
        held_out_rows(packer, NUM_HELD_OUT, UNSEEN),
        len(packer.system),
    )
    log.info("exported: %s", summary(result))
    staging = args.output.with_name(args.output.name + ".partial")
    write_checkpoint(staging, folded, config, packer.tokenizer)
    readme = write_unseen_readme(count_parameters(folded), result, NUM_HELD_OUT, history(args.work))
    (staging / "README.md").write_text(readme, encoding="utf-8")
    shutil.copy(REPOSITORY / "LICENSE", staging)
    replace_files(staging, args.output)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--seed", type=int, default=SEED, help="below 90; other seed, other pictures")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    folder = Path(tempfile.gettempdir()) / "fastvlm-unseen"
    parser.add_argument("--work", type=Path, default=folder, help="where training state is kept")
    output = REPOSITORY / "training" / "unseen" / "checkpoint"
    parser.add_argument("--output", type=Path, default=output, help="where the checkpoint goes")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    # An orderly exit also ends the workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    run_workers(args.workers, partial(train, args))


if __name__ == "__main__":
    main()
