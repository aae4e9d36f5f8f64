"""Divergence of contenders' files from the float model, over answers of the float model itself.

Every engine is fed the reference's own tokens, by its own steps. Logits pass through files, one question at
a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.intervals import bootstrap
from fastvlm_convert.metrics import kl_divergence
from fastvlm_convert.prompt import build_prompt, user_message

# As many as a bootstrap interval needs (`intervals.MINIMUM`), of many kinds, none with a picture.
QUESTIONS = (
    "What is the capital of France?",
    "Explain how a bicycle stays upright.",
    "Write a short poem about the sea.",
    "List three uses of copper.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish and explain.",
    "How do I boil an egg?",
    "What is a neural network?",
    "Tell me about the history of bread.",
    "Give advice for a job interview.",
    "What is 17 plus 25?",
    "Describe a rainy day in a city.",
    "Name five animals that live in the desert.",
    "What does photosynthesis do?",
    "Write a Python function that reverses a list.",
    "Who wrote Romeo and Juliet?",
    "How does a refrigerator work?",
    "Summarize the water cycle in two sentences.",
    "What is the difference between a virus and a bacterium?",
    "Suggest a name for a small bakery.",
    "Why do leaves change color in autumn?",
    "Write an email that declines a meeting.",
    "What is the largest planet of the solar system?",
    "How can I sleep better?",
    "Explain inflation to a child.",
    "What rhymes with 'light'?",
    "Describe how to tie a shoelace.",
    "What is a prime number?",
    "Give me a recipe for pancakes.",
    "What happened in 1969 on the Moon?",
    "Compare cats and dogs as pets.",
    "How long is a marathon?",
)
MAX_ANSWER = 24  # tokens
# Random weights leave the next token all but open, at 0.95 of the logarithm of the vocabulary and more;
# a trained model is far below half of it.
OPEN = 0.5


class Asked(Protocol):
    """An engine's process."""

    def ask(self, **request: Any) -> dict[str, Any]:  # noqa: ANN401  JSON
        """Its answer to one request."""
        ...


@dataclass(frozen=True)
class Quality:
    """How far a file is from the float model.

    Attributes:
        kl: Mean KL divergence over all tokens, nats.
        low: Lower end of its 95 % interval, a bootstrap over questions.
        high: Upper end.
        top1: Share of tokens at which both have the same likeliest one.
        num_tokens: Tokens compared.
    """

    kl: float
    low: float
    high: float
    top1: float
    num_tokens: int


@dataclass(frozen=True)
class Exam:
    """Questions with the float model's answers.

    Attributes:
        prompts: Token ids of each question, as the model was trained on it.
        answers: Token ids of each answer.
        folder: Has the float model's logits, `0.npy` and so on.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    folder: Path


def prompts_of(checkpoint: Checkpoint, questions: Sequence[str] = QUESTIONS) -> list[list[int]]:
    """Token ids of questions without pictures."""
    built = [
        build_prompt(
            [user_message(question, [])],
            checkpoint.prompt.format,
            checkpoint.tokenizer,
            checkpoint.pictures.image,
        )
        for question in questions
    ]
    return [[int(t) for segment in prompt.segments for t in segment] for prompt in built]


def openness(logits: np.ndarray) -> float:
    """Mean entropy of rows [rows, vocab] as a share of the logarithm of the vocabulary, 0 to 1."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return float(-(np.exp(log_p) * log_p).sum(-1).mean() / np.log(logits.shape[-1]))


def hold_exam(reference: Asked, checkpoint: Checkpoint, folder: Path) -> Exam | str:
    """Let the float model answer; or the reason why a divergence from it would say nothing."""
    prompts = prompts_of(checkpoint)
    eos = list(checkpoint.eos_token_ids)
    first = []
    for n, prompt in enumerate(prompts[:4]):
        file = folder / f"{n}.npy"
        reference.ask(do="answer", prompt=prompt, eos_token_ids=eos, limit=1, file=str(file))
        first.append(np.load(file)[0])
    share = openness(np.stack(first))
    if share > OPEN:
        return (
            f"the weights are random: the next token's entropy is {share:.2f} of the most there can be, "
            "and a divergence from that says nothing about a trained model"
        )
    answers = []
    for n, prompt in enumerate(prompts):
        file = folder / f"{n}.npy"
        told = reference.ask(do="answer", prompt=prompt, eos_token_ids=eos, limit=MAX_ANSWER, file=str(file))
        answers.append(told["answer"])
    return Exam(prompts, answers, folder)


def examine(engine: Asked, exam: Exam) -> Quality:
    """Compare an engine with the float model, token by token."""
    file = exam.folder / "candidate.npy"
    divergences, clusters, agree = [], [], []
    for n, (prompt, answer) in enumerate(zip(exam.prompts, exam.answers, strict=True)):
        engine.ask(do="logits", prompt=prompt, answer=answer, file=str(file))
        expected, found = np.load(exam.folder / f"{n}.npy"), np.load(file)
        divergences.append(kl_divergence(expected, found))
        agree.append(expected.argmax(-1) == found.argmax(-1))
        clusters += [n] * len(answer)
    values = np.concatenate(divergences)
    interval = bootstrap(values, clusters=clusters)
    top1 = float(np.concatenate(agree).mean())
    return Quality(float(values.mean()), interval.low, interval.high, top1, len(values))
