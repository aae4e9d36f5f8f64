"""`fastvlm-convert verify --self-test`: prove that the gates of a bundle can fail."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fastvlm_convert.checkpoint.checkpoint import Checkpoint
from fastvlm_convert.cli.console import err, out, plain_table, progress, status_text
from fastvlm_convert.cli.document import EXIT_CODES, Document
from fastvlm_convert.cli.output_format import OutputFormat, is_silent, report_outcomes
from fastvlm_convert.manifest import Status
from fastvlm_convert.outcomes import Outcome
from fastvlm_convert.questions import QuestionSet
from fastvlm_convert.verification.check import Check
from fastvlm_convert.verification.faults.self_test import Planted, SelfTest, self_test

_COLORS = {"caught": "green", "missed": "bold red", "not_applicable": "yellow"}

SelfTestOption = Annotated[
    bool,
    typer.Option("--self-test", help="Plant known faults in copies of BUNDLE, and see that each one fails."),
]


@dataclass(frozen=True)
class Tally:
    """What became of the faults in one place.

    Attributes:
        target: A target, or `bundle` for the files beside the artifacts.
        applicable: Faults that the bundle has a place for.
        caught: Those that made a check fail.
        not_applicable: The others.
    """

    target: str
    applicable: int
    caught: int
    not_applicable: int


@dataclass(frozen=True)
class SelfTestDocument(Document, name="verify-self-test", statuses=("passed", "failed", "not_run")):
    """Whether the gates of a bundle can fail.

    Attributes:
        bundle: The bundle's folder.
        reference: The checkpoint's folder.
        control: Checks of the bundle itself. If one fails, no fault is planted; if one could not be run, none
            in its target.
        tally: What became of the faults, by where they were planted.
        faults: Every fault, by where it was planted.
        seconds: How long it took.
    """

    bundle: str
    reference: str
    control: tuple[Check, ...]
    tally: tuple[Tally, ...]
    faults: tuple[Planted, ...]
    seconds: float


def run_self_test(
    context: typer.Context,
    bundle: Path,
    reference: tuple[Path, Checkpoint],
    questions: QuestionSet,
    interpret: bool,
    output_format: OutputFormat | None,
) -> None:
    """Plant every fault and print what caught it.

    Args:
        context: The command's.
        bundle: Folder of the bundle.
        reference: The checkpoint as it was given, and opened.
        questions: Pictures to ask about; one of them is used.
        interpret: On a Mac, interpret Core ML packages beside running them.
        output_format: What to print.

    Raises:
        typer.Exit: Always: 0 if every fault was caught, 1 if not, 2 if that could not be told.
    """
    start = time.perf_counter()
    given, checkpoint = reference
    with progress(is_silent(context, output_format)) as on_stage:
        result = self_test(bundle, checkpoint, questions, interpret=interpret, on_progress=on_stage)
    tallies = _tallies(result.planted)
    seconds = time.perf_counter() - start
    document = SelfTestDocument(
        bundle=str(bundle),
        reference=str(given),
        control=result.control,
        tally=tallies,
        faults=result.planted,
        seconds=round(seconds, 1),
    )
    verdict = f"{result.status}: {_summary(result, tallies)}"
    report_outcomes(
        context,
        output_format,
        _outcomes(result),
        result.status,
        document,
        lambda: _print(result, verdict, seconds),
        brief=verdict,
    )
    raise typer.Exit(EXIT_CODES[result.status])


def _outcomes(result: SelfTest) -> list[Outcome]:
    """What failed or was not run of the bundle itself, and every fault that it has a place for."""
    outcomes = [
        Outcome(
            f"control.{check.stage}.{check.metric}", "error", check.status, check.reason or "", check.target
        )
        for check in result.control
        if check.status != "passed"
    ]
    for one in result.planted:
        if one.fate != "not_applicable":
            by = "; ".join(f"{check.stage} {check.metric}: {check.reason}" for check in one.checks)
            status: Status = "passed" if one.fate == "caught" else "failed"
            outcomes.append(Outcome(f"fault.{one.fault}", "error", status, by or str(one.reason), one.target))
    return outcomes


def _tallies(planted: tuple[Planted, ...]) -> tuple[Tally, ...]:
    counts: dict[str, Counter[str]] = {}
    for one in planted:
        counts.setdefault(one.target, Counter())[one.fate] += 1
    return tuple(
        Tally(target, fates["caught"] + fates["missed"], fates["caught"], fates["not_applicable"])
        for target, fates in counts.items()
    )


def _summary(result: SelfTest, tallies: tuple[Tally, ...]) -> str:
    if not result.planted:
        return "the bundle itself does not pass, so no fault was planted"
    caught = ", ".join(f"{tally.target} {tally.caught} of {tally.applicable}" for tally in tallies)
    not_run = dict.fromkeys(check.target for check in result.control if check.status == "not_run")
    left_out = f"; not run: {', '.join(not_run)}" if not_run else ""
    return f"faults caught: {caught}{left_out}"


def _print(result: SelfTest, verdict: str, seconds: float) -> None:
    colored = verdict.replace(result.status, status_text(result.status), 1)
    out.print(f"{colored}, in {seconds:.0f} s", soft_wrap=True)
    for check in result.control:
        if check.status != "passed":
            what = f"{check.target} {check.stage} {check.metric}: {escape(check.reason or '')}"
            err.print(f"{status_text(check.status)} the bundle itself, {what}", soft_wrap=True)
    if not result.planted:
        return
    passed = sum(check.status == "passed" for check in result.control)
    out.print(
        f"control: {passed} of {len(result.control)} checks of the bundle itself passed\n", soft_wrap=True
    )
    table = plain_table("fault", "planted in", "result", "stage", "metric", "value", "gate", right=("value",))
    for one in result.planted:
        if one.fate != "not_applicable":
            stages = (escape(one.checks[0].stage), one.checks[0].metric) if one.checks else ("", "")
            figures = _figures(one.checks[0]) if one.checks else ("", "")
            table.add_row(one.fault, one.target, f"[{_COLORS[one.fate]}]{one.fate}[/]", *stages, *figures)
    out.print(table)
    for one in result.planted:
        if one.fate != "caught":
            fate = f"[{_COLORS[one.fate]}]{one.fate.replace('_', ' ')}[/]"
            err.print(f"{fate} {one.fault} ({one.target}): {escape(one.reason or '')}", soft_wrap=True)


def _figures(check: Check) -> tuple[str, str]:
    """What was measured, and what it should have been."""
    if check.threshold is None:
        count = 0 if check.value is None else round(check.value)
        return f"{count} differ{'s' if count == 1 else ''}", "equal"
    sign = "<=" if check.metric.endswith(("_nats", "max_abs")) else ">="
    value = "not finite" if check.value is None else f"{check.value:.3g}"
    return value, f"{sign} {check.threshold:g}"
