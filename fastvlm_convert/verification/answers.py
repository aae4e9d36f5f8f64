"""The answers of a candidate beside the reference's: where they part, and how far apart their tokens are."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Final

import numpy as np

from fastvlm_convert import metrics
from fastvlm_convert.generate import stream_tokens
from fastvlm_convert.intervals import Interval, bootstrap, too_few
from fastvlm_convert.prompt_cache import image_key
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.session import ReusesPrefixes
from fastvlm_convert.verification.reference_run import ReferenceRun

_TAIL: Final = 0.99
_RESAMPLES: Final = 500  # of figures that are sorted anew every time


@dataclass(frozen=True)
class Answer:
    """One question as a candidate and the reference answer it.

    Attributes:
        target: Format of the artifact; `weights` for the reference with a recipe's integers.
        executed_by: What executed it.
        picture: What the question's pictures are called; None for a question of text alone.
        question: The question.
        reference_text: The reference's greedy answer.
        bundle_text: The candidate's own.
        first_difference: The first token, counted from 0, at which they part; None where they do not.
        kl_nats: Divergence at each token of the reference's answer, its end included if it ended, where the
            candidate is given the tokens before; None where it is not finite.
        differing_tokens: Which of these tokens are not the candidate's likeliest.
    """

    target: str
    executed_by: str
    picture: str | None
    question: str
    reference_text: str
    bundle_text: str
    first_difference: int | None
    kl_nats: tuple[float | None, ...]
    differing_tokens: tuple[int, ...]


@dataclass(frozen=True)
class AnswerFigures:
    """All answers of one execution.

    Attributes:
        target: Format of the artifact.
        executed_by: What executed it.
        num_answers: Questions.
        num_pictures: Distinct pictures in them.
        num_tokens: Tokens of the reference's answers.
        kl_mean_nats: Mean divergence of a token; None where one is not finite, as for the next three.
        kl_median_nats: Its median.
        kl_p99_nats: What 99 of 100 tokens do not exceed.
        kl_max_nats: Its maximum.
        top1_agreement: Share of tokens that are the candidate's likeliest, too.
        flips: Share of answers that are not the reference's.
        intervals: By figure; empty where there are too few pictures. A maximum has none.
        no_interval: Why there are none, else None.
    """

    target: str
    executed_by: str
    num_answers: int
    num_pictures: int
    num_tokens: int
    kl_mean_nats: float | None
    kl_median_nats: float | None
    kl_p99_nats: float | None
    kl_max_nats: float | None
    top1_agreement: float
    flips: float
    intervals: dict[str, Interval]
    no_interval: str | None


@dataclass
class KnownEncoder:
    """What an encoder gave; the same graph, loaded in the same way, gives the same bits again.

    Attributes:
        features: Image tokens, float32 [num_image_tokens, hidden], by `image_key` of what was encoded.
        rows: What its operations gave for the reference's picture, as `CandidateValues.add_rows` takes them.
    """

    features: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """What is compared with the reference.

    Attributes:
        target: Its format, for the report.
        model: The exported model.
        answers: What it answers to the questions, without end tokens, where that is known already.
        encoder: What is known of its encoder.
    """

    target: str
    model: LoadedModel
    answers: Sequence[Sequence[int]] | None = None
    encoder: KnownEncoder = field(default_factory=KnownEncoder)

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """As its session does it, where that is not known; not to be written to."""
        key, known = image_key(pixel_values), self.encoder.features
        if key not in known:
            known[key] = self.model.session.encode_image(pixel_values)
        return known[key]


def compare_answer(
    candidate: Candidate,
    question: Question,
    number: int,
    run: ReferenceRun,
    ours: tuple[np.ndarray, np.ndarray],
) -> Answer:
    """Compare one answer.

    Args:
        candidate: The candidate; where its answer differs and is not known, it is asked once more, without
            being given tokens.
        question: The question.
        number: Which one it is, to tell pictures without a name apart.
        run: What the reference makes of it.
        ours: The candidate's own embeddings of the prompt, float32 [tokens, hidden], and its logits before
            each of the tokens fed and after the last, float32 [fed + 1, vocab].
    """
    (embeds, logits), model = ours, candidate.model
    differing = run.differences(logits, model.eos_token_ids)
    token_ids = list(run.token_ids)
    if differing and candidate.answers is not None:
        token_ids = list(candidate.answers[number][: len(run.fed) + 1])
    elif differing:
        token_ids = _own_answer(model, run, embeds, logits, differing[0])
    divergence = metrics.kl_divergence(run.logits[: run.num_tokens], logits[: run.num_tokens])
    name = question.label or f"picture {number + 1}"
    return Answer(
        target=candidate.target,
        executed_by=model.session.executed_by,
        picture=name if question.images else None,
        question=question.text,
        reference_text=model.tokenizer.decode(list(run.token_ids)),
        bundle_text=model.tokenizer.decode(token_ids),
        first_difference=differing[0] if differing else None,
        kl_nats=tuple(float(v) if np.isfinite(v) else None for v in divergence),
        differing_tokens=differing,
    )


def _own_answer(
    candidate: LoadedModel, run: ReferenceRun, embeds: np.ndarray, logits: np.ndarray, first: int
) -> list[int]:
    """What a candidate answers that parts from the reference's answer at a token."""
    session, ends = candidate.session, candidate.eos_token_ids
    limit = min(len(run.fed) + 1, session.context_length - len(embeds))
    said = list(run.token_ids[:first])
    if isinstance(session, ReusesPrefixes):  # what it was given last are the prompt and the answer
        session.start_from([session.copy_prefix(len(embeds) + first)])
        tokens = stream_tokens(session, logits[first], limit - first)
    else:
        said, tokens = [], stream_tokens(session, session.prefill(embeds), limit)
    return said + list(takewhile(lambda t: t not in ends, tokens))


def figures_of(answers: Sequence[Answer]) -> AnswerFigures:
    """The figures of at least one answer, all of one execution."""
    divergence = np.array([np.nan if v is None else v for a in answers for v in a.kl_nats])
    agrees = np.array([t not in a.differing_tokens for a in answers for t in range(len(a.kl_nats))])
    flipped = np.array([a.first_difference is not None for a in answers])
    pictures = {a.picture for a in answers} - {None}
    # A question of text alone stands for itself.
    clusters: list[Hashable] = [a.picture or n for n, a in enumerate(answers)]
    by_token = [cluster for cluster, a in zip(clusters, answers, strict=True) for _ in a.kl_nats]
    no_interval = too_few(len(pictures))
    intervals: dict[str, Interval] = {}
    if no_interval is None:
        intervals["top1_agreement"] = bootstrap(agrees, clusters=by_token)
        intervals["flips"] = bootstrap(flipped, clusters=clusters)
        if np.isfinite(divergence).all():
            statistics: dict[str, Any] = {"mean": "mean", "median": _median, "p99": _tail}
            for name, statistic in statistics.items():
                found = bootstrap(divergence, statistic=statistic, resamples=_RESAMPLES, clusters=by_token)
                intervals[f"kl_{name}_nats"] = found
    kl: dict[str, Callable[[np.ndarray], float]] = {
        "mean": np.mean, "median": _median, "p99": _tail, "max": np.max
    }  # fmt: skip
    return AnswerFigures(
        target=answers[0].target,
        executed_by=answers[0].executed_by,
        num_answers=len(answers),
        num_pictures=len(pictures),
        num_tokens=len(divergence),
        **{f"kl_{name}_nats": _finite(statistic(divergence)) for name, statistic in kl.items()},
        top1_agreement=float(agrees.mean()),
        flips=float(flipped.mean()),
        intervals=intervals,
        no_interval=no_interval,
    )


def _median(values: np.ndarray) -> float:
    return float(np.median(values))


def _tail(values: np.ndarray) -> float:
    return float(np.quantile(values, _TAIL))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
