"""`fastvlm-convert report`: everything that is known about a bundle, as one page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fastvlm_convert.amounts import size_text
from fastvlm_convert.cli.console import err, out, report, status_text
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.output_file import (
    OutputFileOption,
    OverwriteFileOption,
    check_output_file,
    write_output_file,
)
from fastvlm_convert.errors import ImageError

EXAMPLES = """
fastvlm-convert report app -o report.html
fastvlm-convert report app --bench bench.json -o report.html
"""


@dataclass(frozen=True)
class SectionFacts:
    """A section of the page.

    Attributes:
        id: Its anchor.
        title: Its heading.
        status: `shown`, or `not_run` where there was nothing to show.
        reason: Why there was not, else null.
        command: What makes what is missing, or null.
    """

    id: str
    title: str
    status: str
    reason: str | None
    command: str | None


@dataclass(frozen=True)
class ReportDocument(Document, name="report"):
    """A page that was written.

    Attributes:
        bundle: The bundle's folder.
        output: The page.
        size: Its bytes.
        verdict: What it says of the bundle first: `passed`, `failed` or `not_run`.
        sections: What is on it, in order.
    """

    bundle: str
    output: str
    size: int
    verdict: str
    sections: tuple[SectionFacts, ...]


def command(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.", show_default=False)],
    output: OutputFileOption,
    evaluation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `evaluate --json` printed.", show_default=False),
    ] = None,
    bench: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `bench --json` printed.", show_default=False)
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The pictures that `verify` asked about; those that it generates if omitted.",
            show_default=False,
        ),
    ] = None,
    overwrite: OverwriteFileOption = False,
) -> None:
    """Write one page that says what a bundle is worth.

    Verdict, answers, noise, sizes, latency, and what was not run, in one file that needs no network. Made
    from the bundle and what `verify --record` wrote into it; no model is run.
    """
    from fastvlm_convert.report.report import make_report

    check_output_file(output, bundle, overwrite)
    if images is not None and not images.is_dir():
        raise ImageError("there is no such folder of images", where=images, hint="check the path")
    made = make_report(bundle, evaluation=evaluation, bench=bench, images=images)
    write_output_file(output, made.html)
    sections = tuple(
        SectionFacts(section.id, section.title, section.status, section.reason, section.command)
        for section in made.sections
    )
    size = len(made.html.encode())
    document = ReportDocument(str(bundle), str(output), size, made.verdict.status, sections)

    def show() -> None:
        out.print(f"{status_text(made.verdict.status)}  {escape(made.verdict.sentence)}", soft_wrap=True)
        out.print(f"wrote {escape(str(output))}, {size_text(size)}", soft_wrap=True)
        for section in sections:
            if section.status == "not_run":
                how = "" if section.command is None else f"; {section.command}"
                text = f"{section.title}: {section.reason}{how}"
                err.print(f"{status_text('not_run')} {escape(text)}", soft_wrap=True)

    report(context, "passed", document, show, brief=str(output))
