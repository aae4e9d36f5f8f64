"""What int8 activations (ONNX Runtime's accuracy level 4) cost the answers, layer by layer.

    python -m benchmarks.activation_levels MODEL [--questions 100] [--size 64]

MODEL as in benchmarks/quality. Weights stay float, so the figures are of the rounding of activations alone:
one scale by token and block of the weight's size. First the divergence of the answers with the activations of
one kind of layer rounded, then of all, with 95 % bootstraps over questions. Then the signal to noise at every
layer's output over the same questions, the worst first: a massive activation leaves the others of its block
few of the 255 steps.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.inputs import folder_of, question_sets
from benchmarks.quality.judging import Asked, Model, answered, judge, load, prepare, read_again
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.intervals import bootstrap
from fastvlm_convert.model.block_streamer import intercepted
from fastvlm_convert.weights.fold import fold

KINDS: Final = {
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "head": ("head",),
}
LARGEST: Final = 127


def rounded(x: Tensor, size: int) -> Tensor:
    """Activations as int8 products see them: the nearest of 255 steps, one scale a row and block.

    Args:
        x: float32 [..., columns].
        size: Of a block; the last may be shorter.
    """
    columns = x.shape[-1]
    blocks = nn.functional.pad(x, (0, -columns % size)).unflatten(-1, (-1, size))
    scale = blocks.abs().amax(-1, keepdim=True) / LARGEST
    steps = torch.where(scale > 0, blocks / scale, 0.0).round()
    return (steps * scale).flatten(-2)[..., :columns]


def linear_layers(model: Model, kind: str) -> dict[str, nn.Linear]:
    """The decoder's layers of a kind by name; the head is none of them, since its weight is the table's."""
    return {
        name: module
        for name, module in model.decoder.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in KINDS[kind]
    }


@contextmanager
def int8_activations(model: Model, kinds: Sequence[str], size: int) -> Iterator[None]:
    """While the block lasts, layers of some kinds read rounded activations."""
    layers = [layer for kind in kinds for layer in linear_layers(model, kind).values()]
    hook = None
    if "head" in kinds:
        hook = model.decoder.norm.register_forward_hook(lambda _module, _given, out: rounded(out, size))
    try:
        with intercepted({layer: lambda x: rounded(x, size) for layer in layers}):
            yield
    finally:
        if hook is not None:
            hook.remove()


@contextmanager
def measured_outputs(model: Model, size: int) -> Iterator[dict[str, list[float]]]:
    """While the block lasts, signal and noise of rounding at layers' outputs are summed up, by layer."""
    sums: dict[str, list[float]] = {}

    def handler(name: str, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def look(x: Tensor) -> Tensor:
            signal, noise = x @ layer.weight.T, (rounded(x, size) - x) @ layer.weight.T
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += float(signal.square().sum())
            total[1] += float(noise.square().sum())
            return x

        return look

    named = {name: layer for kind in KINDS for name, layer in linear_layers(model, kind).items()}
    with intercepted({layer: handler(name, layer) for name, layer in named.items()}):
        yield sums


def worst_layers(run: Asked, model: Model, size: int) -> list[tuple[str, float]]:
    """Layers with the signal to noise of their outputs in dB, the worst first."""
    with measured_outputs(model, size) as sums:
        read_again(model, run)
    found = [(name, 10 * np.log10(signal / max(noise, 1e-300))) for name, (signal, noise) in sums.items()]
    return sorted(found, key=lambda pair: pair[1])


def main() -> None:
    """Print what every kind of layer costs, and the layers that round worst."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--size", type=int, default=64, help="block size of the weights")
    parser.add_argument("--set", help="one of the model's sets; the last by default")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--work", type=Path, help="where models are kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = open_checkpoint(folder_of(arguments.model, arguments.work or Path(temporary)))
        sets = question_sets(arguments.model)
        asked = sets[arguments.set or list(sets)[-1]]
        step = max(1, len(asked.questions) // arguments.questions)
        # Whether answers are right is not asked.
        chosen = tuple(replace(question, known=()) for question in asked.questions[::step])
        asked = replace(asked, questions=chosen)
        model = load(checkpoint, fold(checkpoint.weights))
        run = answered(checkpoint, model, prepare(checkpoint, asked), asked.max_tokens)
        run = read_again(model, run)
        rows = {kind: (kind,) for kind in arguments.kinds} | {"all": tuple(KINDS)}
        for label, kinds in rows.items():
            with int8_activations(model, kinds, arguments.size):
                found = judge(checkpoint, asked, run, model)
            kl, agree = np.concatenate(found["kl"]), np.concatenate(found["agree"])
            of_token = np.repeat(np.arange(len(found["kl"])), [len(part) for part in found["kl"]])
            spread = bootstrap(kl, clusters=of_token)
            print(
                f"{label:10} KL {kl.mean():.2g} [{spread.low:.2g}, {spread.high:.2g}], "
                f"top-1 {agree.mean():.2%}, {len(kl)} tokens",
                flush=True,
            )
        for name, decibels in worst_layers(run, model, arguments.size)[:12]:
            print(f"{decibels:6.1f} dB  {name}")


if __name__ == "__main__":
    main()
