"""What `evaluate --json` measured."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.evaluation.models import bundle_hash
from fastvlm_convert.report.sources.documents import Fields, read_document

_VERSIONS: Final = (1,)


@dataclass(frozen=True)
class Score:
    """A mean, or the difference of two.

    Attributes:
        value: The figure, or None.
        low: Where its interval begins, or None.
        high: Where it ends, or None.
        reason: Why there is no figure or no interval, or None.
    """

    value: float | None
    low: float | None
    high: float | None
    reason: str | None


@dataclass(frozen=True)
class Column:
    """One model.

    Attributes:
        name: Its name.
        target: Which of a bundle's targets ran, or None for a checkpoint.
        executed_by: What executed it.
        sha256: Hash of its files.
        scores: By metric.
        differences: To the first model, by metric; empty for the first.
    """

    name: str
    target: str | None
    executed_by: str
    sha256: str
    scores: dict[str, Score]
    differences: dict[str, Score]


@dataclass(frozen=True)
class Evaluation:
    """Scores on a dataset.

    Attributes:
        dataset: Its name.
        num_items: Questions that were asked.
        num_pictures: Distinct pictures among them.
        num_differing: Questions that the models do not all answer with the same text.
        columns: One a model; the others are compared with the first.
        metrics: Scores that any model has, the dataset's own first.
        notes: What to know with it.
    """

    dataset: str
    num_items: int
    num_pictures: int
    num_differing: int
    columns: tuple[Column, ...]
    metrics: tuple[str, ...]
    notes: tuple[str, ...]


def read_evaluation(path: Path, bundle: Path) -> Evaluation:
    """The document of `evaluate --json`.

    Args:
        path: The file.
        bundle: The bundle that the page is about; the notes say if none of the models is this.

    Raises:
        BundleError: It cannot be read or is malformed.
    """
    document = read_document(path, "evaluate", _VERSIONS)
    dataset = document.object("dataset")
    columns = tuple(map(_column, document.objects("models")))
    found = (m for column in columns for m, score in column.scores.items() if score.value is not None)
    is_about = bundle_hash(bundle) in {column.sha256 for column in columns}
    about = () if is_about else ("none of these models is this bundle as it is now: evaluate it again",)
    reasons = (s.reason for c in columns for s in (*c.scores.values(), *c.differences.values()) if s.reason)
    return Evaluation(
        dataset=dataset.text("name"),
        num_items=dataset.count("num_items"),
        num_pictures=dataset.count("num_pictures"),
        num_differing=document.count("num_differing"),
        columns=columns,
        metrics=tuple(dict.fromkeys((dataset.text("metric"), *found))),
        notes=tuple(dict.fromkeys((*about, *document.texts("warnings"), *reasons))),
    )


def _column(model: Fields) -> Column:
    return Column(
        name=model.text("name"),
        target=model.optional_text("target"),
        executed_by=model.text("executed_by"),
        sha256=model.text("sha256"),
        scores=_scores(model.objects("scores")),
        differences=_scores(model.objects("differences")),
    )


def _scores(figures: list[Fields]) -> dict[str, Score]:
    found = {}
    for figure in figures:
        interval = figure.optional_object("interval")
        low, high = (None, None) if interval is None else (interval.number("low"), interval.number("high"))
        value, reason = figure.optional_number("value"), figure.optional_text("reason")
        found[figure.text("metric")] = Score(value, low, high, reason)
    return found
