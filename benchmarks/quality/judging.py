"""What a model with other weights makes of the float model's answers, token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.inputs import QuestionSet
from fastvlm_convert import metrics
from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.model.batch import greedy_answers
from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.model.decoder import Qwen2
from fastvlm_convert.model.fastvlm import load_decoder
from fastvlm_convert.prompt import build_prompt, user_message
from fastvlm_convert.quantization.answers import Sample, token_batch
from fastvlm_convert.weights.fold import fold
from fastvlm_convert.weights.source import WeightSource

ROWS: Final = 32  # questions side by side
TOKENS: Final = 512  # whose logits are compared at a time: 100 MB of them at a vocabulary of 49152


@dataclass(frozen=True)
class Model:
    """Weights in use: the encoder as blocks, the decoder whole."""

    chain: BlockStreamer
    decoder: Qwen2

    def encode(self, pixels: Tensor) -> Tensor:
        """Image tokens, float32 [images, num_image_tokens, hidden]."""
        return self.chain.encode(pixels.split(ROWS) if len(pixels) else ())


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens; `Sample.segments`."""

    segments: tuple[np.ndarray, ...]
    picture: int | None


@dataclass(frozen=True)
class Asked:
    """A set of questions, and what the float model made of it.

    Attributes:
        pixels: float32 [pictures, 3, S, S].
        prompts: Of the questions.
        answers: Token ids of the float model's answers, the end token included.
        hidden: Its residual stream where it predicts them, float32 [tokens, hidden] each.
    """

    pixels: Tensor
    prompts: tuple[Prompt, ...]
    answers: tuple[np.ndarray, ...] = ()
    hidden: tuple[Tensor, ...] = field(default=(), repr=False)


def load(checkpoint: Checkpoint, weights: WeightSource) -> Model:
    """A model of a checkpoint's shape with some weights, folded."""
    return Model(BlockStreamer(checkpoint.config, weights), load_decoder(checkpoint.config, weights))


def prepare(checkpoint: Checkpoint, asked: QuestionSet) -> Asked:
    """A set of questions in tokens and pixels; nothing is asked yet."""
    form, images = checkpoint.prompt.format, checkpoint.pictures.image
    prompts, pixels = [], dict[int, np.ndarray]()
    for question in asked.questions:
        shown = [] if question.picture is None else [asked.pictures[question.picture]]
        built = build_prompt([user_message(question.text, shown)], form, checkpoint.tokenizer, images)
        prompts.append(Prompt(built.segments, question.picture))
        if question.picture is not None:
            pixels[question.picture] = built.images[0]
    places = {number: place for place, number in enumerate(sorted(pixels))}
    prompts = [replace(p, picture=None if p.picture is None else places[p.picture]) for p in prompts]
    every = np.concatenate([pixels[n] for n in sorted(pixels)]) if pixels else np.zeros((0, 3, 1, 1))
    return Asked(torch.from_numpy(every.astype(np.float32)), tuple(prompts))


@torch.inference_mode()
def answered(checkpoint: Checkpoint, model: Model, asked: Asked, max_tokens: int) -> Asked:
    """The same with a model's greedy answers."""
    features = model.encode(asked.pixels)
    embeds = [_embedded(model.decoder, prompt, features) for prompt in asked.prompts]
    said = greedy_answers(model.decoder, embeds, [max_tokens] * len(embeds), checkpoint.eos_token_ids)
    return replace(asked, answers=tuple(np.asarray(ids, np.int64) for ids in said))


@torch.inference_mode()
def read_again(model: Model, asked: Asked) -> Asked:
    """The same with a model's residual stream where it predicts the answers' tokens."""
    return replace(asked, hidden=_hidden(model, asked.prompts, asked.answers, model.encode(asked.pixels)))


def _embedded(decoder: Qwen2, prompt: Prompt, features: Tensor) -> Tensor:
    texts = [decoder.embed_tokens(torch.from_numpy(ids)) for ids in prompt.segments]
    if prompt.picture is None:
        return texts[0]
    return torch.cat([texts[0], features[prompt.picture], texts[1]])


def _hidden(
    model: Model, prompts: Sequence[Prompt], answers: Sequence[np.ndarray], features: Tensor
) -> tuple[Tensor, ...]:
    """The residual stream at every token that predicts one of an answer; rows of like length side by side."""
    lengths = [
        sum(map(len, prompt.segments)) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        samples = [Sample(prompts[n].segments, answers[n]) for n in rows]
        shown = features[[p for n in rows if (p := prompts[n].picture) is not None]]
        batch = token_batch(samples, shown, model.decoder.embed_tokens)
        x = batch.embeds
        for layer in model.decoder.layers:
            x = model.chain.run(layer, x)
        parts = torch.split(x[batch.answers], [len(answers[n]) for n in rows])
        found |= dict(zip(rows, parts, strict=True))
    return tuple(found[n] for n in range(len(prompts)))


@torch.inference_mode()
def judge(checkpoint: Checkpoint, asked: QuestionSet, float_run: Asked, model: Model) -> dict[str, Any]:
    """Compare a model with the float model on its answers.

    Returns:
        As JSON holds it: `kl`, nats of every token of every answer; `agree`, 1 where the likeliest token is
        the same; `right`, 1 where the model's own answer is right, None where no answer is known; and
        `entropy`, the float model's mean over the tokens, in nats.
    """
    features = model.encode(float_run.pixels)
    hidden = _hidden(model, float_run.prompts, float_run.answers, features)
    reference = BlockStreamer(checkpoint.config, fold(checkpoint.weights))
    kl, agree, entropy = list[list[float]](), list[list[int]](), 0.0
    for rows in _together([len(answer) for answer in float_run.answers]):
        logits = reference.logits(torch.cat([float_run.hidden[n] for n in rows]))
        entropy += float(torch.distributions.Categorical(logits=logits).entropy().sum())
        a = logits.numpy()
        b = model.decoder.logits(torch.cat([hidden[n] for n in rows])).numpy()
        ends = np.cumsum([len(float_run.answers[n]) for n in rows])[:-1]
        kl += [[float(f"{v:.4g}") for v in part] for part in np.split(metrics.kl_divergence(a, b), ends)]
        same = (a.argmax(-1) == b.argmax(-1)).astype(int)
        agree += [part.tolist() for part in np.split(same, ends)]
    return {
        "kl": kl,
        "agree": agree,
        "right": right_answers(
            checkpoint, asked, _own_answers(checkpoint, asked, float_run, model, features, agree)
        ),
        "entropy": entropy / sum(map(len, float_run.answers)),
    }


def _together(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of consecutive answers with at most `TOKENS` tokens in all."""
    rows, tokens = list[int](), 0
    for n, length in enumerate(lengths):
        if rows and tokens + length > TOKENS:
            yield rows
            rows, tokens = [], 0
        rows.append(n)
        tokens += length
    yield rows


def _own_answers(
    checkpoint: Checkpoint,
    asked: QuestionSet,
    float_run: Asked,
    model: Model,
    features: Tensor,
    agree: Sequence[Sequence[int]],
) -> list[np.ndarray]:
    """What a model answers; where no answer is known, what the float model says stands for it."""
    changed = [n for n, q in enumerate(asked.questions) if q.known and not all(agree[n])]
    embeds = [_embedded(model.decoder, float_run.prompts[n], features) for n in changed]
    limits = [asked.max_tokens] * len(embeds)
    said = greedy_answers(model.decoder, embeds, limits, checkpoint.eos_token_ids)
    own = dict(zip(changed, said, strict=True))
    return [np.asarray(own.get(n, answer), np.int64) for n, answer in enumerate(float_run.answers)]


def right_answers(
    checkpoint: Checkpoint, asked: QuestionSet, answers: Sequence[np.ndarray]
) -> list[int | None]:
    """1 where an answer is right, 0 where it is not, None where no answer is known."""
    found: list[int | None] = []
    for question, ids in zip(asked.questions, answers, strict=True):
        said = [token for token in ids.tolist() if token not in checkpoint.eos_token_ids]
        text = checkpoint.tokenizer.decode(said).strip()
        found.append(int(asked.is_right(text, question.known)) if question.known else None)
    return found
