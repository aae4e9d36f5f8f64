"""The README of the demo checkpoint, generated from what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from network import NetworkConfig

from fastvlm_convert.demo import make_sample
from fastvlm_convert.demo.samples import HELD_OUT_SEED

_FROM_NOTHING = """\
`vision` learns dense labels of every image token; `decoder` learns to answer from symbols that stand in
for image tokens (one core each, at the same time); `projector` maps one to the other; `joint` trains
everything on the answers, while the learning rate follows one cosine to zero and the training aids fade."""


@dataclass(frozen=True)
class PhaseRecord:
    """What one phase of the training took."""

    name: str
    minutes: float
    steps: int
    pictures: int


def write_readme(
    config: NetworkConfig,
    num_parameters: int,
    result: dict[str, tuple[int, int]],
    num_pictures: int,
    history: list[PhaseRecord],
    source: Path | None,
) -> str:
    """The README as Markdown; `source` is the checkpoint that training continued from, if any."""
    sample = make_sample(HELD_OUT_SEED)
    examples = {question.kind: question for question in sample.questions}
    accuracy = "\n".join(
        f"| {kind} | {right} / {asked} | {right / asked:.1%} |" for kind, (right, asked) in result.items()
    )
    right, asked = (sum(column) for column in zip(*result.values(), strict=True))
    phases = "\n".join(f"| {p.name} | {p.minutes:.0f} | {p.steps:,} | {p.pictures:,} |" for p in history)
    shown = "\n".join(f"- *{q.question}* -> {q.answer}" for q in examples.values())
    return f"""# fastvlm-demo

A small FastVLM, trained from scratch on generated pictures, in the file layout of Apple's
releases. With it, every step of a conversion runs, and can be checked by its answers, without a download.

- Vision: FastViTHD, {config.image_size} pixels, widths {_listed(config.widths)}, depths
  {_listed(config.depths)}, {config.num_image_tokens} image tokens of {config.feature_size}.
- Decoder: Qwen2, {config.layers} layers, hidden {config.hidden}, {config.heads} query and
  {config.kv_heads} key-value heads of {config.head_dim}, MLP {config.intermediate}, tied embedding.
- Tokenizer: byte-level BPE over printable ASCII, {config.vocab_size} tokens; it knows no others.
- {num_parameters / 1e6:.2f} million parameters, stored as float16.

It knows the pictures of `fastvlm_convert.demo` and nothing else: up to four colored shapes, words
and numbers, one per quadrant, on wide, tall and square pictures. Questions about a held-out picture:

{shown}

## Accuracy

Exact answers (greedy decoding, the whole string equal) to the questions about {num_pictures} held-out
pictures, from seeds that training never uses. Weights are stored in float16, arithmetic is in float32.

| kind | right | share |
|---|---|---|
{accuracy}
| **all** | {right} / {asked} | **{right / asked:.1%}** |

## Training

On two CPU cores that were shared with other work. Each picture is drawn once and never seen again:

| phase | minutes | steps | pictures |
|---|---|---|---|
{phases}

{_FROM_NOTHING if source is None else f"It was trained on from `{source.name}`, on answers only."}

To repeat the training from scratch, or to continue from a checkpoint with other pictures:

```
python training/train_demo.py
python training/train_demo.py --from checkpoints/fastvlm-demo --seed 5 --minutes 15 --output DIR
```

## License

Apache-2.0, see `LICENSE`. No data or weights from others were used.
"""


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(str(number) for number in numbers)


def write_unseen_readme(
    num_parameters: int, result: dict[str, tuple[int, int]], num_pictures: int, history: list[PhaseRecord]
) -> str:
    """The README of the checkpoint of the unseen style, as Markdown."""
    right, asked = (sum(column) for column in zip(*result.values(), strict=True))
    accuracy = "\n".join(f"| {kind} | {r} / {n} | {r / n:.1%} |" for kind, (r, n) in result.items())
    (phase,) = history
    return f"""# fastvlm-unseen

A FastVLM of {num_parameters / 1e6:.2f} million parameters (float16), trained from scratch by
`python training/train_unseen.py` on boards of dials, charts, cloths, icons, curves and dotted letters
(`training/unseen`). Nothing that calibrates by default is drawn by that code, or was seen by this model, so
benchmarks judge with it how a quantization does on a model whose pictures nobody has.

Trained for {phase.minutes:.0f} minutes on two CPU cores: {phase.steps:,} steps, {phase.pictures:,} pictures.
Exact answers (greedy, the whole string equal) about {num_pictures} held-out pictures:

| kind | right | share |
|---|---|---|
{accuracy}
| **all** | {right} / {asked} | **{right / asked:.1%}** |

Apache-2.0, see `LICENSE`. No data or weights from others were used.
"""
