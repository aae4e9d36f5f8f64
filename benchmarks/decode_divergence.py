"""How far quantized integers lead a checkpoint's answers astray: for `benchmarks.decode_levers`.

Questions are asked about degraded pictures, which make the model unsure, and texts without a picture of a
model whose vocabulary is a real language's. The reference answers once; what is compared are the logits over
its answers' tokens. Intervals are bootstrapped over pictures and over texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.quantize_answers import DEGRADED_SEED, Test, ask, logits_of, pictures
from fastvlm_convert import metrics
from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.generate import generate, teacher_forced
from fastvlm_convert.intervals import bootstrap
from fastvlm_convert.model.fastvlm import load_model
from fastvlm_convert.model.session import TorchSession
from fastvlm_convert.prompt import build_prompt, user_message
from fastvlm_convert.quantization.calibration import read_calibration
from fastvlm_convert.quantization.prepared_weights import prepare_weights
from fastvlm_convert.quantization.weight_plan import plan_weights
from fastvlm_convert.quantized.weight import dense_view
from fastvlm_convert.recipe import Recipe
from fastvlm_convert.recipe_settings import QuantizeRule
from fastvlm_convert.weights.source import WeightSource

CONTEXT, ANSWER = 512, 24
REAL_VOCABULARY = 10_000
ASKED = (
    "What is {}?",
    "Tell me a story about {}.",
    "Write two sentences about {}.",
    "Why do people like {}?",
)
SUBJECTS = (
    "bread", "a bicycle", "the sea", "copper", "winter", "chess", "photosynthesis", "a refrigerator",
    "the capital of France", "a lost dog", "the largest planet", "inflation", "tides", "paper",
)  # fmt: skip


@dataclass(frozen=True)
class Divergence:
    """Mean KL divergence over tokens, in nats, and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Answered:
    """A text's token ids, the reference's answer, and the logits that gave it, [tokens, vocabulary]."""

    prompt: np.ndarray
    answer: list[int]
    logits: np.ndarray


@dataclass(frozen=True)
class Exam:
    """A checkpoint's answers; `kinds` names what they are about."""

    checkpoint: Checkpoint
    pictures: Test
    texts: Sequence[Answered]
    known: dict[tuple[QuantizeRule, ...], tuple[Divergence, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, count: int) -> "Exam":
        """Ask about so many pictures, and of a real language model a text for every three of them."""
        is_real = checkpoint.config.decoder.vocab_size > REAL_VOCABULARY
        asked = [form.format(subject) for form in ASKED for subject in SUBJECTS]
        texts = _answered(checkpoint, asked[: count // 3]) if is_real else []
        return cls(checkpoint, ask(checkpoint, pictures(DEGRADED_SEED, count, bad=True)), texts)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the answers are about."""
        return ("pictures", "texts") if self.texts else ("pictures",)

    def divergence(self, recipe: Recipe) -> tuple[Divergence, ...]:
        """Of a recipe's integers, by kind; equal rules give equal integers."""
        if recipe.quantize not in self.known:
            plan = plan_weights(self.checkpoint, recipe)
            data = read_calibration(None, recipe.calibration) if plan.is_calibrated else None
            self.known[recipe.quantize] = self._of(dense_view(prepare_weights(plan, data).weights))
        return self.known[recipe.quantize]

    def _of(self, weights: WeightSource) -> tuple[Divergence, ...]:
        test = self.pictures
        found = logits_of(self.checkpoint, weights, test)
        groups = np.repeat(test.pictures, [len(sample.answer) for sample in test.samples])
        result = [_mean(metrics.kl_divergence(test.logits, found), groups)]
        if self.texts:
            session = TorchSession(load_model(self.checkpoint.config, weights, True), CONTEXT)
            parts = [
                metrics.kl_divergence(t.logits, teacher_forced(session, session.embed(t.prompt), t.answer))
                for t in self.texts
            ]
            groups = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
            result.append(_mean(np.concatenate(parts), groups))
        return tuple(result)


def _mean(values: np.ndarray, groups: np.ndarray) -> Divergence:
    found = bootstrap(values, clusters=groups)
    return Divergence(float(values.mean()), found.low, found.high)


def _answered(checkpoint: Checkpoint, texts: Sequence[str]) -> list[Answered]:
    """What the reference says to texts."""
    session, answers = TorchSession(load_model(checkpoint.config, checkpoint.weights), CONTEXT), []
    for text in texts:
        message, settings = user_message(text, []), checkpoint.pictures.image
        prompt = build_prompt([message], checkpoint.prompt.format, checkpoint.tokenizer, settings)
        said = list(generate(session, prompt, checkpoint.eos_token_ids, ANSWER).token_ids)
        ids = np.asarray(prompt.segments[0], np.int64)
        answers.append(Answered(ids, said, teacher_forced(session, session.embed(ids), said)))
    return answers
