"""What a build may require of an evaluation."""

from dataclasses import dataclass
from typing import Final

from fastvlm_convert.evaluation.results import Evaluation, Figure, ModelResult
from fastvlm_convert.evaluation.scores import Metric
from fastvlm_convert.intervals import Interval
from fastvlm_convert.manifest import Status
from fastvlm_convert.outcomes import Outcome

LABELS: Final[dict[Metric, str]] = {
    "exact_match": "exact match",
    "vqa_accuracy": "VQA accuracy",
    "anls": "ANLS",
}


@dataclass(frozen=True)
class Gates:
    """What is required, in the dataset's own score.

    Attributes:
        min_accuracy: Percent that every model must reach.
        max_drop: Points that a model may be below the first.
    """

    min_accuracy: float | None = None
    max_drop: float | None = None


def outcomes_of(evaluation: Evaluation, gates: Gates) -> tuple[Outcome, ...]:
    """What became of every gate, and of every model where there is no gate."""
    metric = evaluation.dataset.metric
    found = []
    for model in evaluation.models:
        score = figure_of(model.scores, metric)
        if gates.min_accuracy is not None:
            found.append(_least(model, score, gates.min_accuracy))
        else:
            status: Status = "not_run" if score.value is None else "passed"
            message = f"{LABELS[metric]} {percent_text(score)}"
            found.append(Outcome("accuracy", "info", status, message, model.name))
        if gates.max_drop is not None and model.differences:
            found.append(_drop(evaluation, model, figure_of(model.differences, metric), gates.max_drop))
    return tuple(found)


def status_of(outcomes: tuple[Outcome, ...]) -> Status:
    """`failed` where a gate failed, `not_run` where one could not be judged, else `passed`."""
    gates = {outcome.status for outcome in outcomes if outcome.severity == "error"}
    return "failed" if "failed" in gates else "not_run" if "not_run" in gates else "passed"


def figure_of(figures: tuple[Figure, ...], metric: Metric) -> Figure:
    """The figure of a metric."""
    return next(figure for figure in figures if figure.metric == metric)


def percent_text(figure: Figure) -> str:
    """`96.5 % (94.0 to 98.5)`; why there is none where there is none."""
    if figure.value is None:
        return f"not run: {figure.reason}"
    return f"{100 * figure.value:.1f} %{_range(figure.interval)}"


def points_text(figure: Figure) -> str:
    """`-1.5 points (-3.0 to 0.5)`; why there is none where there is none."""
    if figure.value is None:
        return f"not run: {figure.reason}"
    return f"{_points(figure.value)} points{_range(figure.interval, signed=True)}"


def _least(model: ModelResult, score: Figure, least: float) -> Outcome:
    required = f"at least {least:g} % is required"
    message = f"{LABELS[score.metric]} {percent_text(score)}, {required}"
    if score.value is None:
        return Outcome("min-accuracy", "error", "not_run", message, model.name)
    status: Status = "passed" if _rounded(score.value) >= least else "failed"
    return Outcome("min-accuracy", "error", status, message, model.name)


def _drop(evaluation: Evaluation, model: ModelResult, difference: Figure, most: float) -> Outcome:
    first = evaluation.models[0].name
    found = f"{LABELS[difference.metric]} {points_text(difference)} against {first}"
    message = f"{found}, at most {most:g} below is allowed"
    if difference.value is None:
        return Outcome("max-drop", "error", "not_run", message, model.name)
    status: Status = "passed" if -_rounded(difference.value) <= most else "failed"
    return Outcome("max-drop", "error", status, message, model.name)


def _rounded(share: float) -> float:
    """Percent without what floats cannot hold: 0.29 * 100 is 28.999999999999996."""
    return round(100 * share, 9)


def _points(share: float) -> str:
    return f"{100 * share + 0.0:+.1f}" if round(100 * share, 1) else "0.0"


def _range(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return ""
    ends = [_points(end) if signed else f"{100 * end:.1f}" for end in (interval.low, interval.high)]
    return f" ({ends[0]} to {ends[1]})"
