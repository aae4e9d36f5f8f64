"""What integers do to the reference's answers."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_convert import metrics
from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.json_file import read_json_file


@dataclass(frozen=True)
class Agreement:
    """How far a candidate follows the reference's answers to some samples.

    Attributes:
        kl_mean_nats: Mean divergence of the tokens' distributions.
        top1_agreement: Share of tokens that are still the likeliest.
        num_tokens: Tokens compared.
        num_samples: Samples that they belong to.
    """

    kl_mean_nats: float
    top1_agreement: float
    num_tokens: int
    num_samples: int


@dataclass(frozen=True)
class AnswerScore:
    """What the integers do to the reference's answers to calibration samples.

    Attributes:
        total: Of all samples that were compared.
        is_held_out: Whether no layer was solved with these samples; with a single sample there is no other.
        with_pictures: Of those that hold a picture; None where there are none.
        text_alone: Of the others; None where there are none. A language model loses far more of them.
    """

    total: Agreement
    is_held_out: bool
    with_pictures: Agreement | None
    text_alone: Agreement | None


def answer_score(
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
    samples: np.ndarray,
    has_picture: np.ndarray,
    is_held_out: bool,
) -> AnswerScore:
    """Compare the logits of the reference and of a candidate, some tokens at a time.

    Args:
        parts: float32 [tokens, vocab] twice; at least one token in all.
        samples: Which sample every token belongs to, int64 [tokens in all].
        has_picture: Whether that sample holds a picture, bool [tokens in all].
        is_held_out: Whether no layer was solved with them.
    """
    divergences, same = [], []
    for reference, candidate in parts:
        divergences.append(metrics.kl_divergence(reference, candidate))
        same.append(np.argmax(reference, -1) == np.argmax(candidate, -1))
    divergence, agrees = np.concatenate(divergences), np.concatenate(same)

    def of(chosen: np.ndarray) -> Agreement | None:
        if not chosen.any():
            return None
        owners = np.unique(samples[chosen])
        mean, share = float(divergence[chosen].mean()), float(agrees[chosen].mean())
        return Agreement(mean, share, int(chosen.sum()), len(owners))

    total = of(np.ones(len(divergence), bool))
    assert total is not None, "there is a token"
    return AnswerScore(total, is_held_out, of(has_picture), of(~has_picture))


def save_score(path: Path, score: AnswerScore) -> None:
    """Write a score, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(asdict(score), allow_nan=False))


def load_score(path: Path) -> AnswerScore | None:
    """A score that was saved; None where there is none, or a damaged one."""
    try:
        value = read_json_file(path)
        parts = {name: _agreement(value[name]) for name in ("total", "with_pictures", "text_alone")}
        total = parts.pop("total")
        return None if total is None else AnswerScore(total, bool(value["is_held_out"]), **parts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _agreement(value: Mapping[str, Any] | None) -> Agreement | None:
    if value is None:
        return None
    return Agreement(
        float(value["kl_mean_nats"]),
        float(value["top1_agreement"]),
        int(value["num_tokens"]),
        int(value["num_samples"]),
    )
