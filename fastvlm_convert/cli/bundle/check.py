"""`fastvlm-convert bundle check`: see that a bundle is what its manifest says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fastvlm_convert.amounts import count_text, size_text
from fastvlm_convert.cli.console import err, out, plain_table, print_warnings, progress, report, status_text
from fastvlm_convert.cli.document import EXIT_CODES, Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.options import BundleArgument
from fastvlm_convert.delivery.check import CheckResult, check_bundle
from fastvlm_convert.errors import UsageError, printable
from fastvlm_convert.verification.check import Check

EXAMPLES = """
fastvlm-convert bundle check app
fastvlm-convert bundle check app --signature --public-key key.pub
"""
_FEW = 20  # problems that are printed


@dataclass(frozen=True)
class CheckDocument(Document, name="bundle-check", statuses=("passed", "failed", "not_run")):
    """What was found about a bundle.

    Attributes:
        bundle: The bundle's folder.
        files: How many files its manifest lists.
        total_bytes: Their size.
        checks: One for each question.
        problems: Everything that is wrong.
        warnings: What the user should know.
    """

    bundle: str
    files: int
    total_bytes: int
    checks: tuple[Check, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def command(
    context: typer.Context,
    bundle: BundleArgument,
    signature: Annotated[
        bool, typer.Option("--signature", help="Check the signature too; needs --public-key.")
    ] = False,
    public_key: Annotated[
        Path | None,
        typer.Option(
            "--public-key", metavar="FILE", help="Public key of who signed it, in PEM.", show_default=False
        ),
    ] = None,
) -> None:
    """Check every file of a bundle against its manifest.

    Every hash, nothing missing or extra, the license and its notice, what `verify --record` wrote, and on
    request the signature. The exit code is 1 if a check fails, and 2 if one could not be run.
    """
    if signature != (public_key is not None):
        given, missing = (
            ("--signature", "--public-key FILE") if signature else ("--public-key", "--signature")
        )
        raise UsageError(f"{given} needs {missing}", hint="give both: --signature --public-key FILE")
    with progress(flags_of(context).is_silent) as on_stage:
        result = check_bundle(bundle, public_key, on_stage)
    files = count_text(result.num_files, "file")
    verdict = f"{result.status}: {files}, {size_text(result.total_bytes)}"
    document = CheckDocument(
        bundle=str(bundle),
        files=result.num_files,
        total_bytes=result.total_bytes,
        checks=result.checks,
        problems=result.problems,
        warnings=result.warnings,
    )
    report(context, result.status, document, lambda: _print(result, verdict), brief=verdict)
    raise typer.Exit(EXIT_CODES[result.status])


def _print(result: CheckResult, verdict: str) -> None:
    print_warnings(result.warnings)
    table = plain_table("check", "of", "status")
    for check in result.checks:
        table.add_row(check.stage, check.metric, status_text(check.status))
    out.print(table)
    for problem in result.problems[:_FEW]:
        err.print(escape(printable(problem)), soft_wrap=True)
    if len(result.problems) > _FEW:
        err.print(f"and {len(result.problems) - _FEW} more; --json lists all", soft_wrap=True)
    for check in result.checks:
        if check.status == "not_run":
            err.print(f"{check.stage} not run: {escape(printable(check.reason or ''))}", soft_wrap=True)
    out.print(f"\n{verdict.replace(result.status, status_text(result.status), 1)}", soft_wrap=True)
