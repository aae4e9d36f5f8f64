"""What `evaluate --json` measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A figure with its interval, or why it has none.

    Attributes:
        value: The figure.
        low: Where the interval begins, or None.
        high: Where it ends, or None.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Column:
    """One model.

    Attributes:
        name: Its name.
        executed_by: What executed it.
        scores: By metric.
    """

    name: str
    executed_by: str
    scores: dict[str, Score]


@dataclass(frozen=True)
class Evaluation:
    """Scores on a dataset.

    Attributes:
        dataset: Its name.
        num_questions: Questions that were asked.
        columns: One a model.
        differences: Between the first model and the others: name, metric, difference.
        notes: What to know with it.
    """

    dataset: str
    num_questions: int
    columns: tuple[Column, ...]
    differences: tuple[tuple[str, str, Score], ...]
    notes: tuple[str, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that any model has."""
        return tuple(dict.fromkeys(metric for column in self.columns for metric in column.scores))
