"""`--output-format`: what a command that checks prints, for people or for a CI system."""

import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated

import typer

from fastvlm_convert.cli.console import report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.errors import UsageError
from fastvlm_convert.outcomes import Outcome, github, junit


class OutputFormat(StrEnum):
    """The formats."""

    TEXT = "text"
    JSON = "json"
    GITHUB = "github"
    JUNIT = "junit"


def _agrees(context: typer.Context, chosen: OutputFormat | None) -> OutputFormat | None:
    """The chosen format.

    Raises:
        UsageError: `--json` asks for another one.
    """
    if chosen not in (None, OutputFormat.JSON) and flags_of(context).as_json:
        raise UsageError(
            f"--json and --output-format {chosen} exclude each other", hint="give one of the two"
        )
    return chosen


OutputFormatOption = Annotated[
    OutputFormat | None,
    typer.Option(
        "--output-format",
        metavar="|".join(OutputFormat),
        help="What to print: text, one JSON document as --json does, annotations of GitHub Actions, or a "
        "JUnit report.",
        callback=_agrees,
        show_default=False,
    ),
]


def is_silent(context: typer.Context, output_format: OutputFormat | None) -> bool:
    """Whether nothing may be printed beside the result."""
    return flags_of(context).is_silent or output_format not in (None, OutputFormat.TEXT)


def report_outcomes(
    context: typer.Context,
    output_format: OutputFormat | None,
    outcomes: Sequence[Outcome],
    status: str,
    document: Document,
    show: Callable[[], None],
    brief: str | None = None,
) -> None:
    """Print the result of a command that checks, in the format that was asked for.

    More than six parameters: those of `console.report`, and what the other formats are made from.

    Args:
        context: The command's.
        output_format: What `--output-format` says; None prints what the command's flags ask for.
        outcomes: What GitHub's annotations and the JUnit report tell.
        status: `passed`, `failed` or `not_run`.
        document: What `--json` prints.
        show: Prints the result for people.
        brief: With `--quiet`: the one line to print.
    """
    if output_format is OutputFormat.GITHUB:
        sys.stdout.write(github(outcomes))
    elif output_format is OutputFormat.JUNIT:
        sys.stdout.write(junit(outcomes, context.info_name or ""))
    else:
        report(context, status, document, show, brief=brief)
