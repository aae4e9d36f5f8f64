"""What integers do to the reference's answers."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fastvlm_convert import metrics
from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.json_file import read_json_file


@dataclass(frozen=True)
class AnswerScore:
    """What the integers do to the reference's answers to calibration samples.

    Attributes:
        kl_mean_nats: Mean divergence of the tokens' distributions.
        top1_agreement: Share of tokens that are still the likeliest.
        num_tokens: Tokens compared.
        num_held_out: Samples that they belong to, which no layer was solved with; 0 where there was only one
            sample, which they were solved with.
    """

    kl_mean_nats: float
    top1_agreement: float
    num_tokens: int
    num_held_out: int


def answer_score(parts: Iterable[tuple[np.ndarray, np.ndarray]], num_held_out: int) -> AnswerScore:
    """Compare the logits of the reference and of a candidate, some tokens at a time.

    Args:
        parts: float32 [tokens, vocab] twice; at least one token in all.
        num_held_out: Samples that they belong to, or 0.
    """
    divergence, agreeing, tokens = 0.0, 0.0, 0
    for reference, candidate in parts:
        divergence += float(metrics.kl_divergence(reference, candidate).sum())
        agreeing += metrics.top1_agreement(reference, candidate) * len(reference)
        tokens += len(reference)
    return AnswerScore(divergence / tokens, agreeing / tokens, tokens, num_held_out)


def save_score(path: Path, score: AnswerScore) -> None:
    """Write a score, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(asdict(score), allow_nan=False))


def load_score(path: Path) -> AnswerScore | None:
    """A score that was saved; None where there is none, or a damaged one."""
    try:
        value = read_json_file(path)
        return AnswerScore(
            float(value["kl_mean_nats"]),
            float(value["top1_agreement"]),
            int(value["num_tokens"]),
            int(value["num_held_out"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
