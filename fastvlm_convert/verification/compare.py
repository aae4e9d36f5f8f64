"""Compare a candidate with the reference, stage by stage, on pictures with questions.

Every numeric stage gets the reference's own input, so that a difference belongs to the stage that shows
it; only the greedy text runs end to end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastvlm_convert import metrics
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.generate import embed_prompt, generate, teacher_forced
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.verification.check import Check, Measurement, at_least, at_most, equal

LOGIT_STAGES = ("prefill_logits", "decode_logits")
NUMERIC_STAGES = ("preprocessing", "image_features", "inputs_embeds", *LOGIT_STAGES)


@dataclass
class _Stage:
    """Pairs of one stage, collected over all pictures."""

    reference: list[np.ndarray] = field(default_factory=list)
    candidate: list[np.ndarray] = field(default_factory=list)

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        if reference.shape != candidate.shape:
            raise CheckpointError(
                f"the reference is another model: it gives {list(reference.shape)} where the bundle gives "
                f"{list(candidate.shape)}",
                hint="give the checkpoint that the bundle was made from",
            )
        self.reference.append(reference)
        self.candidate.append(candidate)

    def worst(self, metric: Callable[[np.ndarray, np.ndarray], float | None]) -> float | None:
        """The metric of the picture where it is least; None where all are equal. NaN is the worst of all."""
        values = [
            v for r, c in zip(self.reference, self.candidate, strict=True) if (v := metric(r, c)) is not None
        ]
        return float(np.min(values)) if values else None


@dataclass(frozen=True)
class StageGates:
    """What one execution of a target must reach.

    Attributes:
        min_sqnr_db: Least signal to noise by stage; a stage that is not there is measured only.
        identical_text: Whether the greedy answers must be the reference's.
        max_new_tokens: Length of the answers that are compared.
        max_kl_mean_nats: Largest mean divergence of the answers' tokens, or None.
        min_top1_agreement: Least share of the answers' tokens with the same likeliest token, or None.
    """

    min_sqnr_db: Mapping[str, float]
    identical_text: bool
    max_new_tokens: int
    max_kl_mean_nats: float | None = None
    min_top1_agreement: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Everything `compare` found."""

    checks: tuple[Check, ...]
    measurements: tuple[Measurement, ...]


def compare(
    target: str,
    candidate: LoadedModel,
    reference: LoadedModel,
    questions: Sequence[Question],
    gates: StageGates,
    on_progress: OnShare = ignore_share,
) -> Comparison:
    """Run both models on the same questions.

    Args:
        target: Format of the candidate, for the report.
        candidate: The exported model.
        reference: The torch reference at the candidate's image size and mode.
        questions: At least one.
        gates: What the candidate must reach.
        on_progress: Called with the share of the questions done, 0..1.
    """
    stages = {name: _Stage() for name in NUMERIC_STAGES}
    ids_differ: list[int] = []
    text_differs: list[int] = []
    for number, question in enumerate(questions):
        ids_equal, text_equal = _run_both(candidate, reference, question, gates.max_new_tokens, stages)
        if not ids_equal:
            ids_differ.append(number)
        if not text_equal:
            text_differs.append(number)
        on_progress((number + 1) / len(questions))

    runs = candidate.session.executed_by
    checks = [
        equal(target, "preprocessing", "token_ids", len(ids_differ), f"prompts differ: {ids_differ}", None)
    ]
    measurements: list[Measurement] = []
    for name, stage in stages.items():
        value = stage.worst(metrics.sqnr_db)
        if name in gates.min_sqnr_db:
            checks.append(at_least(target, name, "sqnr_db", value, gates.min_sqnr_db[name], runs))
        else:
            measurements.append(Measurement(target, name, "sqnr_db", value, value is None, runs))
        measurements += _measure(target, name, stage, runs)
    checks += _check_answers(target, stages, gates, runs)
    differing = f"{len(text_differs)} of {len(questions)} answers differ: {text_differs}"
    if gates.identical_text:
        checks.append(equal(target, "greedy_text", "token_ids", len(text_differs), differing, runs))
    else:
        share = 1 - len(text_differs) / len(questions)
        measurements.append(
            Measurement(target, "greedy_text", "identical_share", share, not text_differs, runs)
        )
    return Comparison(tuple(checks), tuple(measurements))


def _run_both(
    candidate: LoadedModel,
    reference: LoadedModel,
    question: Question,
    max_new_tokens: int,
    stages: dict[str, _Stage],
) -> tuple[bool, bool]:
    """One question through both; returns whether prompts and greedy answers are equal."""
    theirs = reference.conversation(question.messages)
    ours = candidate.conversation(question.messages)
    stages["preprocessing"].add(theirs.images[0], ours.images[0])
    ids_equal = all(np.array_equal(a, b) for a, b in zip(theirs.segments, ours.segments, strict=True))

    features = [reference.session.encode_image(image) for image in theirs.images]
    for image, expected in zip(theirs.images, features, strict=True):
        stages["image_features"].add(expected, candidate.session.encode_image(image))
    embeds = embed_prompt(reference.session, theirs, features)
    stages["inputs_embeds"].add(embeds, embed_prompt(candidate.session, theirs, features))

    left = reference.session.context_length - theirs.length(reference.session.num_image_tokens)
    limit = max(1, min(max_new_tokens, left))
    answer = generate(reference.session, theirs, reference.eos_token_ids, limit, features=features)
    end = reference.eos_token_ids[:1]
    forced = [*(answer.token_ids or end), *end]  # an empty answer gets one decode step all the same
    expected_logits = teacher_forced(reference.session, embeds, forced)
    logits = teacher_forced(candidate.session, embeds, forced)
    stages["prefill_logits"].add(expected_logits[:1], logits[:1])
    stages["decode_logits"].add(expected_logits[1:], logits[1:])

    said = generate(candidate.session, ours, candidate.eos_token_ids, limit)
    return ids_equal, said.token_ids == answer.token_ids


def _check_answers(
    target: str, stages: Mapping[str, _Stage], gates: StageGates, executed_by: str
) -> list[Check]:
    """Divergence and agreement over all tokens of all answers."""
    pairs = [stages[name] for name in LOGIT_STAGES]
    reference = np.concatenate([rows for stage in pairs for rows in stage.reference])
    candidate = np.concatenate([rows for stage in pairs for rows in stage.candidate])
    checks = []
    if gates.max_kl_mean_nats is not None:
        value = float(metrics.kl_divergence(reference, candidate).mean())
        checks.append(at_most(target, "answers", "kl_mean_nats", value, gates.max_kl_mean_nats, executed_by))
    if gates.min_top1_agreement is not None:
        value = metrics.top1_agreement(reference, candidate)
        checks.append(
            at_least(target, "answers", "top1_agreement", value, gates.min_top1_agreement, executed_by)
        )
    return checks


def _measure(target: str, name: str, stage: _Stage, executed_by: str) -> list[Measurement]:
    pairs = list(zip(stage.reference, stage.candidate, strict=True))
    is_exact = all(np.array_equal(r, c) for r, c in pairs)
    figures: dict[str, float | None] = {
        "psnr_db": stage.worst(metrics.psnr_db),
        "max_abs_error": float(np.max([metrics.max_abs_error(r, c) for r, c in pairs])),
        "cosine_similarity": stage.worst(metrics.cosine_similarity),
    }
    if name in LOGIT_STAGES:
        divergence = np.concatenate([metrics.kl_divergence(r, c) for r, c in pairs])
        rows = [np.concatenate(side) for side in zip(*pairs, strict=True)]
        figures |= {
            "kl_mean_nats": float(divergence.mean()),
            "kl_p99_nats": float(np.quantile(divergence, 0.99)),
            "top1_agreement": metrics.top1_agreement(*rows),
        }
    finite = {metric: v if v is not None and np.isfinite(v) else None for metric, v in figures.items()}
    return [
        Measurement(target, name, metric, value, is_exact, executed_by) for metric, value in finite.items()
    ]
