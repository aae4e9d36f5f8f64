"""Compare a candidate with the reference on pictures with questions: stage by stage, and end to end.

Every numeric stage gets the reference's own input, so that a difference belongs to the stage that shows it.
Where an execution has no gate for logits, that is measured on the first question alone.
End to end, each side uses its own prompt, pixels, features, embeddings and KV cache; only the answer's tokens
are the reference's, because two answers cannot be compared token by token once they part.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastvlm_convert import metrics
from fastvlm_convert.errors import BundleError, CheckpointError
from fastvlm_convert.generate import check_fits, teacher_forced
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.prompt import Prompt
from fastvlm_convert.prompt_reading import embed_prompt
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.session import ReadsAtOnce, Session
from fastvlm_convert.verification.answers import Answer, AnswerFigures, Candidate, compare_answer, figures_of
from fastvlm_convert.verification.check import Check, Measurement, at_least, at_most, equal, not_run
from fastvlm_convert.verification.reference_run import ReferenceRun

LOGIT_STAGES = ("prefill_logits", "decode_logits")
NUMERIC_STAGES = ("preprocessing", "image_features", "inputs_embeds", *LOGIT_STAGES)
END_TO_END = "end_to_end"


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
        max_kl_mean_nats: Largest mean divergence of the answers' tokens, end to end, or None.
        min_top1_agreement: Least share of them with the same likeliest token, end to end, or None.
    """

    min_sqnr_db: Mapping[str, float]
    identical_text: bool
    max_new_tokens: int
    max_kl_mean_nats: float | None = None
    min_top1_agreement: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        checks: Figures against their thresholds.
        measurements: Figures that gate nothing.
        answers: One a question, where questions were asked.
    """

    checks: tuple[Check, ...]
    measurements: tuple[Measurement, ...]
    answers: tuple[Answer, ...] = ()


def compare(
    candidate: Candidate,
    runs: Sequence[ReferenceRun],
    questions: Sequence[Question],
    gates: StageGates,
    on_progress: OnShare = ignore_share,
) -> Comparison:
    """Run a candidate on questions that the reference has answered.

    Args:
        candidate: The exported model.
        runs: What the torch reference, at the candidate's image size and mode, makes of each question.
        questions: At least one.
        gates: What the candidate must reach.
        on_progress: Called with the share of the questions done, 0..1.
    """
    target, model = candidate.target, candidate.model
    stages = {name: _Stage() for name in (*NUMERIC_STAGES, END_TO_END)}
    ids_differ: list[int] = []
    answers: list[Answer] = []
    for number, (question, whole) in enumerate(zip(questions, runs, strict=True)):
        run = whole.shortened(gates.max_new_tokens)
        ours = _own_prompt(model, question, run)
        if not _same_ids(run.prompt, ours):
            ids_differ.append(number)
        # Figures that gate nothing are those of one question: logits take most of the time.
        is_staged = number == 0 or any(name in gates.min_sqnr_db for name in LOGIT_STAGES)
        made = _run_candidate(candidate, ours, run, stages, is_staged)
        answers.append(compare_answer(candidate, question, number, run, made))
        on_progress((number + 1) / len(questions))

    executed_by = model.session.executed_by
    checks = [
        equal(target, "preprocessing", "token_ids", len(ids_differ), f"prompts differ: {ids_differ}", None)
    ]
    measurements: list[Measurement] = []
    for name, stage in stages.items():
        checks += _check_stage(target, name, stage, gates, executed_by)
        measurements += _measure(target, name, stage, executed_by, name in gates.min_sqnr_db)
    figures = figures_of(answers)
    measurements += _measure_answers(figures)
    checks += _check_answers(figures, gates)
    text_differs = [number for number, a in enumerate(answers) if a.first_difference is not None]
    differing = f"{len(text_differs)} of {len(questions)} answers differ: {text_differs}"
    if gates.identical_text:
        checks.append(equal(target, "greedy_text", "token_ids", len(text_differs), differing, executed_by))
    else:
        share = 1 - len(text_differs) / len(questions)
        measurements.append(
            Measurement(target, "greedy_text", "identical_share", share, not text_differs, executed_by)
        )
    return Comparison(tuple(checks), tuple(measurements), tuple(answers))


def _own_prompt(candidate: LoadedModel, question: Question, run: ReferenceRun) -> Prompt:
    """The candidate's own prompt for a question.

    Raises:
        BundleError: Its pictures have another size than the reference's.
    """
    ours, size = candidate.conversation(question.messages), candidate.images.size
    for theirs in run.prompt.images:
        if theirs.shape[-1] != size:
            raise BundleError(
                f"the bundle makes pictures {size} pixels wide, checkpoint and recipe say {theirs.shape[-1]}"
            )
    return ours


def _same_ids(theirs: Prompt, ours: Prompt) -> bool:
    pairs = zip(theirs.segments, ours.segments, strict=True)  # one more than pictures on either side
    return all(np.array_equal(a, b) for a, b in pairs)


def _run_candidate(
    candidate: Candidate, ours: Prompt, run: ReferenceRun, stages: Mapping[str, _Stage], is_staged: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Add what a candidate makes of one question to the stages.

    Args:
        candidate: The exported model.
        ours: Its own prompt.
        run: What the reference makes of the question.
        stages: Get the pairs.
        is_staged: Whether logits are computed from the reference's embeddings, too.

    Returns:
        Its embeddings of the prompt, float32 [tokens, hidden], and its logits end to end, float32
        [fed + 1, vocab].
    """
    session = candidate.model.session
    own_features = []
    for theirs, own, expected in zip(run.prompt.images, ours.images, run.features, strict=True):
        prepared = session.prepare(own)
        stages["preprocessing"].add(theirs, prepared)
        encoded = candidate.encode_image(own)
        own_features.append(encoded)
        # Equal pixels, equal features: a picture is encoded once.
        is_equal = np.array_equal(theirs, prepared)
        features = encoded if is_equal else candidate.encode_image(candidate.model.unprepared(theirs))
        stages["image_features"].add(expected, features)
    stages["inputs_embeds"].add(run.embeds, embed_prompt(session, run.prompt, run.features))

    forced = [*run.fed, 0]  # the last is not fed
    embeds, logits = embed_prompt(session, ours, own_features), None
    is_same = np.array_equal(embeds, run.embeds)
    if is_staged or is_same:
        staged = _forced(session, run.embeds, forced)
        stages["prefill_logits"].add(run.logits[:1], staged[:1])
        stages["decode_logits"].add(run.logits[1:], staged[1:])
        logits = staged if is_same else None
    if logits is None:
        check_fits(len(embeds), len(run.fed), session.context_length)
        logits = _forced(session, embeds, forced)
    stages[END_TO_END].add(run.logits, logits)
    return embeds, logits


def _forced(session: Session, inputs_embeds: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
    """`teacher_forced`, in one pass where steps of one token are nothing that anybody ships."""
    if isinstance(session, ReadsAtOnce):
        return session.teacher_forced(inputs_embeds, np.asarray(token_ids[:-1], np.int64))
    return teacher_forced(session, inputs_embeds, token_ids)


def _check_stage(target: str, name: str, stage: _Stage, gates: StageGates, executed_by: str) -> list[Check]:
    """The gate of a stage, where it has one."""
    if name not in gates.min_sqnr_db:
        return []
    if not stage.reference:
        return [not_run(target, name, "sqnr_db", "no question has a picture")]
    value = stage.worst(metrics.sqnr_db)
    return [at_least(target, name, "sqnr_db", value, gates.min_sqnr_db[name], executed_by)]


def _check_answers(figures: AnswerFigures, gates: StageGates) -> list[Check]:
    """Divergence and agreement over all tokens of all answers, end to end."""
    target, executed_by, checks = figures.target, figures.executed_by, []
    if gates.max_kl_mean_nats is not None:
        value = np.nan if figures.kl_mean_nats is None else figures.kl_mean_nats
        checks.append(at_most(target, END_TO_END, "kl_mean_nats", value, gates.max_kl_mean_nats, executed_by))
    if gates.min_top1_agreement is not None:
        value, least = figures.top1_agreement, gates.min_top1_agreement
        checks.append(at_least(target, END_TO_END, "top1_agreement", value, least, executed_by))
    return checks


def _measure_answers(figures: AnswerFigures) -> list[Measurement]:
    """The same, whether they are gated or not."""
    names = (*(f"kl_{name}_nats" for name in ("mean", "median", "p99", "max")), "top1_agreement", "flips")
    return [
        Measurement(figures.target, END_TO_END, name, getattr(figures, name), False, figures.executed_by)
        for name in names
    ]


def _measure(target: str, name: str, stage: _Stage, executed_by: str, is_gated: bool) -> list[Measurement]:
    """Figures of a stage; its signal to noise where no gate reports it."""
    pairs = list(zip(stage.reference, stage.candidate, strict=True))
    if not pairs:
        return []
    is_exact = all(np.array_equal(r, c) for r, c in pairs)
    figures: dict[str, float | None] = {} if is_gated else {"sqnr_db": stage.worst(metrics.sqnr_db)}
    figures |= {
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
