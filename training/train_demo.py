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
import shutil
import signal
import sys
import tempfile
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
from data import Batch, held_out_rows
from evaluate import exact_match, summary
from model import DemoModel, Losses
from network import NetworkConfig, fold
from report import write_readme
from text import Packer, train_tokenizer
from trainer import Phase, Trainer, history, replace_files
from workers import Worker, run_workers

from fastvlm_convert.demo import write_check_images

log = logging.getLogger("training")

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
