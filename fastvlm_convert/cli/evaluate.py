"""`fastvlm-convert evaluate`: how well models answer questions whose answers are known."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fastvlm_convert.amounts import count_text
from fastvlm_convert.cli.answering import MaxNewTokensOption
from fastvlm_convert.cli.console import err, out, plain_table, print_warnings, progress, status_text
from fastvlm_convert.cli.document import EXIT_CODES, Document
from fastvlm_convert.cli.options import (
    TARGET_NAMES,
    NoCacheOption,
    cache_used,
    chosen_targets,
    complete_target,
)
from fastvlm_convert.cli.output_file import OverwriteFileOption, check_output_file, write_output_file
from fastvlm_convert.cli.output_format import OutputFormatOption, is_silent, report_outcomes
from fastvlm_convert.cli.waiting_threads import wait_passively
from fastvlm_convert.errors import UsageError
from fastvlm_convert.evaluation.datasets import DEMO, DEMO_PICTURES, open_dataset
from fastvlm_convert.evaluation.differences import check_suffix, differences_text, differing
from fastvlm_convert.evaluation.gates import (
    LABELS,
    Gates,
    figure_of,
    outcomes_of,
    percent_text,
    points_text,
    status_of,
)
from fastvlm_convert.evaluation.journal import remove_journal
from fastvlm_convert.evaluation.models import columns_of
from fastvlm_convert.evaluation.results import (
    DatasetFacts,
    Evaluation,
    ItemResult,
    ModelResult,
    Settings,
)
from fastvlm_convert.evaluation.run import evaluate
from fastvlm_convert.outcomes import Outcome

EXAMPLES = """
fastvlm-convert evaluate FastVLM-0.5B app --dataset val_v1.0.json --limit 500
fastvlm-convert evaluate FastVLM-0.5B app --dataset mine.jsonl --max-drop 1
"""

ModelsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODEL...",
        help="Checkpoints and bundles; the others are compared with the first.",
        show_default=False,
    ),
]
DatasetOption = Annotated[
    str,
    typer.Option(
        metavar=f"FILE|{DEMO}",
        help="Questions with answers: .jsonl, or VQAv2, TextVQA, DocVQA, AI2D as published; "
        f"'{DEMO}' is {DEMO_PICTURES} generated pictures.",
        show_default=False,
    ),
]


ImagesFolderOption = Annotated[
    Path | None,
    typer.Option(
        "--images",
        metavar="FOLDER",
        help="Where the pictures are, unless beside the questions.",
        show_default=False,
    ),
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Ask the first N questions only.", show_default=False)
]
InstructionOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Added to every question: 'Answer the question using a single word or phrase.', say.",
        show_default=False,
    ),
]
TargetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar=TARGET_NAMES,
        help="Target of bundles to run, repeatable; their first if omitted.",
        autocompletion=complete_target,
        show_default=False,
    ),
]
MinAccuracyOption = Annotated[
    float | None,
    typer.Option(min=0, max=100, metavar="PERCENT", help="Exit 1 if a model is below.", show_default=False),
]
MaxDropOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=100,
        metavar="POINTS",
        help="Exit 1 if a model is more than this below the first.",
        show_default=False,
    ),
]
DifferencesOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write the answers that differ side by side: .md or .jsonl.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class EvaluateDocument(Document, name="evaluate", statuses=("passed", "failed", "not_run")):
    """How well models answered.

    Attributes:
        dataset: What was asked.
        settings: How.
        models: How each did.
        items: Every question with every answer.
        num_differing: Questions that the models do not all answer with the same text.
        warnings: What the user should know.
        outcomes: What became of every gate.
        differences_file: Where the answers that differ were written, or None.
    """

    dataset: DatasetFacts
    settings: Settings
    models: tuple[ModelResult, ...]
    items: tuple[ItemResult, ...]
    num_differing: int
    warnings: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    differences_file: str | None


def command(
    context: typer.Context,
    models: ModelsArgument,
    dataset: DatasetOption,
    images: ImagesFolderOption = None,
    limit: LimitOption = None,
    instruction: InstructionOption = None,
    target: TargetsOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    min_accuracy: MinAccuracyOption = None,
    max_drop: MaxDropOption = None,
    output: DifferencesOption = None,
    overwrite: OverwriteFileOption = False,
    output_format: OutputFormatOption = None,
    no_cache: NoCacheOption = False,
) -> None:
    """Compare models on questions whose answers are known.

    An interrupted run goes on where it was. --min-accuracy and --max-drop judge the dataset's own score: VQA
    accuracy for VQAv2 and TextVQA, ANLS for DocVQA, exact match for all others.
    """
    wait_passively()
    columns = columns_of(models, chosen_targets(target or []))
    if max_drop is not None and len(columns) < 2:
        raise UsageError("--max-drop compares with the first model, and there is one", hint="give two")
    if output is not None:
        check_suffix(output)
        for column in columns:
            check_output_file(output, column.path, overwrite)
    questions = open_dataset(dataset, images=images, limit=limit)
    silent = is_silent(context, output_format)
    with cache_used(not no_cache), progress(silent, remaining=True) as on_stage:
        found, journals = evaluate(columns, questions, Settings(max_new_tokens, instruction), on_stage)
    outcomes = outcomes_of(found, Gates(min_accuracy, max_drop))
    status = status_of(outcomes)
    if output is not None:
        write_output_file(output, differences_text(found, output.suffix))
    report_outcomes(
        context,
        output_format,
        outcomes,
        status,
        _document(found, outcomes, output),
        lambda: _print(found, outcomes, output),
        brief="; ".join(_verdict(outcomes)),
    )
    for journal in journals:
        remove_journal(journal)
    raise typer.Exit(EXIT_CODES[status])


def _document(found: Evaluation, outcomes: tuple[Outcome, ...], output: Path | None) -> EvaluateDocument:
    return EvaluateDocument(
        dataset=found.dataset,
        settings=found.settings,
        models=found.models,
        items=found.items,
        num_differing=found.num_differing,
        warnings=found.warnings,
        outcomes=outcomes,
        differences_file=None if output is None else str(output),
    )


def _verdict(outcomes: tuple[Outcome, ...]) -> list[str]:
    gates = [o for o in outcomes if o.severity == "error"]
    if gates:
        return [f"{outcome.status}: {outcome.where}: {outcome.message}" for outcome in gates]
    return [f"{outcome.where}: {outcome.message}" for outcome in outcomes]


def _print(found: Evaluation, outcomes: tuple[Outcome, ...], output: Path | None) -> None:
    print_warnings(found.warnings)
    _print_scores(found)
    for outcome in outcomes:
        if outcome.severity == "error":
            out.print(
                f"{status_text(outcome.status)} {escape(f'{outcome.where}: {outcome.message}')}",
                soft_wrap=True,
            )
    err.print(_facts(found), soft_wrap=True)
    _print_reasons(found)
    for model in found.models:
        if model.num_cut:
            cut = f"{model.name}: {model.num_cut} answers were cut at the limit (--max-new-tokens)"
            print_warnings((cut,))
    count = len(differing(found))
    what = "answered differently" if len(found.models) > 1 else "answered wrongly"
    where = "; -o FILE.md writes them side by side" if output is None else f", in {output}"
    verb = "is" if count == 1 else "are"
    asked = count_text(found.dataset.num_items, "question")
    err.print(
        escape(f"{count} of {asked} {verb} {what}{where if count or output else ''}"),
        soft_wrap=True,
    )


def _print_reasons(found: Evaluation) -> None:
    """Why there are scores that were not computed, and figures without an interval."""
    for reason in dict.fromkeys(f.reason for f in found.models[0].scores if f.value is None):
        labels = [LABELS[f.metric] for f in found.models[0].scores if f.reason == reason]
        err.print(escape(f"{', '.join(labels)} not run: {reason}"), soft_wrap=True)
    figures = [figure for m in found.models for figure in (*m.scores, *m.differences)]
    for reason in dict.fromkeys(f.reason for f in figures if f.value is not None and f.reason):
        err.print(escape(reason), soft_wrap=True)


def _print_scores(found: Evaluation) -> None:
    """A row for each model, and one for its difference to the first."""
    metrics = [f.metric for f in found.models[0].scores if f.value is not None]
    labels = [LABELS[metric] + ("*" if metric == found.dataset.metric else "") for metric in metrics]
    table = plain_table("", *labels, "executed by", right=labels)
    for model in found.models:
        scores = [percent_text(figure_of(model.scores, metric)) for metric in metrics]
        table.add_row(escape(model.name), *scores, escape(model.executed_by))
        if model.differences:
            points = [points_text(figure_of(model.differences, metric)) for metric in metrics]
            table.add_row("  less the first", *points, "")
    out.print(table)


def _facts(found: Evaluation) -> str:
    facts = found.dataset
    asked = count_text(facts.num_items, "question") + (
        f" of {facts.num_listed}" if facts.num_items < facts.num_listed else ""
    )
    has_intervals = any(f.interval for m in found.models for f in m.scores)
    intervals = "; in parentheses 95 % intervals, bootstrapped over pictures" if has_intervals else ""
    return escape(
        f"\n{facts.name} ({facts.layout}): {asked} about {count_text(facts.num_pictures, 'picture')}; * "
        f"marks the score that this dataset is judged by{intervals}"
    )
