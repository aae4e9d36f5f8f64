"""Ask every model every question, one model after the other, and compare what they answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.errors import ConversionError
from fastvlm_convert.evaluation.items import Dataset, Item
from fastvlm_convert.evaluation.journal import Answered, Binding, open_journal
from fastvlm_convert.evaluation.models import Column, OpenColumn, open_column
from fastvlm_convert.evaluation.results import (
    DatasetFacts,
    Evaluation,
    ModelResult,
    Settings,
    figures,
    item_results,
)
from fastvlm_convert.progress import OnStage, ignore_stage
from fastvlm_convert.runtime.loaded import LoadedModel

LOADING: Final = "loading"
ANSWERING: Final = "answering"


@dataclass(frozen=True)
class _Answers:
    """What one model answered, and how it ran."""

    sha256: str
    executed_by: str
    by_id: dict[str, Answered]
    notes: tuple[str, ...]
    journal: Path | None


def evaluate(
    columns: Sequence[Column],
    dataset: Dataset,
    settings: Settings,
    on_progress: OnStage = ignore_stage,
) -> tuple[Evaluation, tuple[Path, ...]]:
    """Ask and compare.

    One model is in memory at a time. What was answered before an interruption is not asked again.

    Args:
        columns: The models; the others are compared with the first.
        dataset: The questions.
        settings: How they are asked.
        on_progress: Called with the name of a stage and the share of it that is done, 0..1.

    Returns:
        What was found, and the journals to remove once it is reported (`journal.remove_journal`).

    Raises:
        ConversionError: A model cannot be run, a picture cannot be read, or a question does not fit.
    """
    answers = []
    for number, column in enumerate(columns):

        def on_stage(stage: str, share: float, number: int = number) -> None:
            on_progress(stage, share if stage == LOADING else (number + share) / len(columns))

        answers.append(_answers_of(column, dataset, settings, on_stage))
    journals = tuple(a.journal for a in answers if a.journal is not None)
    return _evaluation(columns, dataset, settings, answers), journals


def _answers_of(column: Column, dataset: Dataset, settings: Settings, on_progress: OnStage) -> _Answers:
    """Load a model and ask it what its journal does not know; the model is gone afterwards."""
    opened = open_column(column, lambda share: on_progress(LOADING, share))
    on_progress(LOADING, 1.0)
    with open_journal(_binding(column, opened, dataset, settings)) as journal:
        waiting = [item for item in dataset.items if item.id not in journal.answers]
        on_progress(ANSWERING, 0.0)
        for done, (item, answered) in enumerate(_asked(opened.loaded, dataset, waiting, settings), 1):
            journal.add(item.id, answered)
            on_progress(ANSWERING, done / len(waiting))
    return _Answers(
        opened.sha256,
        opened.loaded.session.executed_by,
        journal.answers,
        (*opened.notes, *journal.notes),
        journal.path,
    )


def _binding(column: Column, opened: OpenColumn, dataset: Dataset, settings: Settings) -> Binding:
    return Binding(
        model_sha256=opened.sha256,
        target=column.target,
        executed_by=opened.loaded.session.executed_by,
        dataset_sha256=dataset.sha256,
        max_new_tokens=settings.max_new_tokens,
        instruction=settings.instruction,
    )


def _asked(
    loaded: LoadedModel, dataset: Dataset, items: Sequence[Item], settings: Settings
) -> Iterator[tuple[Item, Answered]]:
    """Items with their answers, one after the other.

    Raises:
        ConversionError: Says at which question.
    """
    for item in items:
        question = "\n".join(filter(None, (item.question, settings.instruction)))
        try:
            picture = dataset.picture(item)
            stream = loaded.ask(picture, question, max_new_tokens=settings.max_new_tokens)
            finished = stream.finish().finished
        except ConversionError as error:
            where = item.place if error.where is None else f"{item.place}, {error.where}"
            raise type(error)(str(error.args[0]), where=where, hint=error.hint) from error
        yield item, Answered(stream.text, finished)


def _evaluation(
    columns: Sequence[Column], dataset: Dataset, settings: Settings, answers: Sequence[_Answers]
) -> Evaluation:
    items = item_results(dataset, [a.by_id for a in answers])
    models = tuple(
        ModelResult(
            name=column.name,
            path=str(column.path),
            target=column.target,
            sha256=given.sha256,
            executed_by=given.executed_by,
            num_cut=sum(not item.responses[number].finished for item in items),
            scores=figures(items, number),
            differences=figures(items, number, against=0) if number else (),
        )
        for number, (column, given) in enumerate(zip(columns, answers, strict=True))
    )
    facts = DatasetFacts(
        name=dataset.name,
        layout=dataset.layout,
        folder=None if dataset.folder is None else str(dataset.folder),
        sha256=dataset.sha256,
        num_items=len(items),
        num_pictures=dataset.num_pictures,
        num_listed=dataset.num_listed,
        metric=dataset.metric,
    )
    notes = dict.fromkeys((*dataset.notes, *(note for a in answers for note in a.notes)))
    differing = sum(item.differs for item in items)
    return Evaluation(facts, settings, models, items, differing, tuple(notes))
