"""What an evaluation found, as frozen data: the document of `--json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.evaluation.items import Dataset, Layout
from fastvlm_convert.evaluation.journal import Answered
from fastvlm_convert.evaluation.scores import MIN_ANNOTATORS, SCORES, Metric, scores_of
from fastvlm_convert.intervals import Interval, bootstrap, paired_bootstrap, too_few


@dataclass(frozen=True)
class DatasetFacts:
    """What was asked.

    Attributes:
        name: What people call the dataset.
        layout: How it was written down.
        folder: Where its pictures are; null for the demo's, which are drawn.
        sha256: Hash of the questions asked, their answers and pictures.
        num_items: Questions asked.
        num_pictures: Distinct pictures among them.
        num_listed: Questions that there were to choose from.
        metric: The score that results on it are given in.
    """

    name: str
    layout: Layout
    folder: str | None
    sha256: str
    num_items: int
    num_pictures: int
    num_listed: int
    metric: Metric


@dataclass(frozen=True)
class Settings:
    """How it was asked.

    Attributes:
        max_new_tokens: Longest answer in tokens; null is the default.
        instruction: What followed every question, on a line of its own; or null.
    """

    max_new_tokens: int | None = None
    instruction: str | None = None


@dataclass(frozen=True)
class Figure:
    """A score's mean, or the difference of two.

    Attributes:
        metric: The score.
        value: Mean over the questions, 0..1; of a difference, this model's less the first's. Null where the
            answers do not allow the score.
        num_items: Questions that it is the mean of.
        interval: Where it lies; null where there is none.
        reason: Why value or interval is null.
    """

    metric: Metric
    value: float | None
    num_items: int
    interval: Interval | None
    reason: str | None


@dataclass(frozen=True)
class ModelResult:
    """How one model did.

    Attributes:
        name: What people call it.
        path: What was given.
        target: Which of a bundle's targets ran; null for a checkpoint.
        sha256: Hash of its files.
        executed_by: What executed it.
        num_cut: Answers that the limit of tokens ended.
        scores: Every score.
        differences: To the first model; empty for the first.
    """

    name: str
    path: str
    target: str | None
    sha256: str
    executed_by: str
    num_cut: int
    scores: tuple[Figure, ...]
    differences: tuple[Figure, ...]


@dataclass(frozen=True)
class Response:
    """What one model answered.

    Attributes:
        text: The answer.
        finished: Whether the model ended it, rather than the limit of tokens.
        scores: By metric, 0..1; null where the answers do not allow it.
    """

    text: str
    finished: bool
    scores: dict[Metric, float | None]


@dataclass(frozen=True)
class ItemResult:
    """A question, and what the models answered.

    Attributes:
        id: Its id.
        image: The picture's file, relative to the dataset's folder; of the demo, `demo/NUMBER`.
        question: As asked, without the instruction.
        answers: What is right.
        responses: One for each model, in their order.
    """

    id: str
    image: str
    question: str
    answers: tuple[str, ...]
    responses: tuple[Response, ...]

    @property
    def differs(self) -> bool:
        """Whether the models' texts are not all the same."""
        return len({response.text for response in self.responses}) > 1


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        dataset: What was asked.
        settings: How.
        models: How each did.
        items: Every question with every answer.
        num_differing: Questions that the models do not all answer with the same text.
        warnings: What the user should know.
    """

    dataset: DatasetFacts
    settings: Settings
    models: tuple[ModelResult, ...]
    items: tuple[ItemResult, ...]
    num_differing: int
    warnings: tuple[str, ...]


def item_results(dataset: Dataset, answers: Sequence[Mapping[str, Answered]]) -> tuple[ItemResult, ...]:
    """Every question with what the models answered, scored.

    Args:
        dataset: The questions.
        answers: By id, one mapping for each model.
    """
    results = []
    for item in dataset.items:
        given = [of_model[item.id] for of_model in answers]
        responses = tuple(Response(a.text, a.finished, scores_of(a.text, item.answers)) for a in given)
        results.append(ItemResult(item.id, item.image, item.question, item.answers, responses))
    return tuple(results)


def figures(items: Sequence[ItemResult], column: int, against: int | None = None) -> tuple[Figure, ...]:
    """Every score of a model, or its difference to another's.

    Args:
        items: What the models answered.
        column: The model's place.
        against: The other's, whose scores are subtracted.
    """
    return tuple(_figure(items, metric, column, against) for metric in SCORES)


def _figure(items: Sequence[ItemResult], metric: Metric, column: int, against: int | None) -> Figure:
    chosen = [item for item in items if item.responses[column].scores[metric] is not None]
    if not chosen:
        too_few_answers = f"every question has fewer than {MIN_ANNOTATORS} answers"
        return Figure(metric, None, 0, None, too_few_answers)
    values = _scores(chosen, metric, column)
    others = np.zeros_like(values) if against is None else _scores(chosen, metric, against)
    pictures = [item.image for item in chosen]
    reason = too_few(len(set(pictures))) or _all_alike(values - others)
    if reason:
        interval = None
    elif against is None:
        interval = bootstrap(values, clusters=pictures)
    else:
        interval = paired_bootstrap(values, others, clusters=pictures)
    return Figure(metric, float((values - others).mean()), len(chosen), interval, reason)


def _all_alike(values: np.ndarray) -> str | None:
    """Why a figure whose questions all give the same has no interval: drawing them again gives it again."""
    return "no interval where every question gives the same" if np.ptp(values) == 0 else None


def _scores(items: Sequence[ItemResult], metric: Metric, column: int) -> np.ndarray:
    """float64 [items]."""
    return np.asarray([item.responses[column].scores[metric] for item in items], np.float64)
