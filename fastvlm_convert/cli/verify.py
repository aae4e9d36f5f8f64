"""`fastvlm-convert verify`: prove that a bundle answers as its checkpoint does."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import err, out, print_json, print_warnings, progress, status_text
from fastvlm_convert.cli.options import AdapterOption, JsonOption, VerboseOption
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.verify.bundle import VerifyResult, to_dict, verify
from fastvlm_convert.verify.questions import folder_questions, standard_questions

_EXIT_CODES = {"passed": 0, "failed": 1, "not_run": 2}


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.", show_default=False)],
    reference: Annotated[
        Path,
        typer.Option(metavar="CHECKPOINT", help="The checkpoint it was made from.", show_default=False),
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Pictures to compare on, with an optional questions.json; 16 generated ones by default.",
            show_default=False,
        ),
    ] = None,
    interpret: Annotated[
        bool, typer.Option("--interpret", help="On a Mac, also interpret Core ML packages.")
    ] = False,
    adapter: AdapterOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare a bundle with the PyTorch reference, stage by stage; exit code 1 if a gate fails."""
    manifest = load_manifest(bundle)
    checkpoint = open_checkpoint(reference, adapter)
    questions = standard_questions() if images is None else folder_questions(images)
    with progress(quiet=as_json) as on_stage:
        result = verify(bundle, manifest, checkpoint, questions, on_stage, interpret=interpret)
    if as_json:
        print_json(
            "verify",
            result.status,
            bundle=str(bundle),
            reference=str(reference),
            questions=len(questions),
            checks=[to_dict(check) for check in result.checks],
            measurements=[to_dict(measurement) for measurement in result.measurements],
            warnings=list(result.warnings),
        )
    else:
        print_warnings(result.warnings)
        _print(result, len(questions))
    raise typer.Exit(_EXIT_CODES[result.status])


def _print(result: VerifyResult, num_questions: int) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("target", "stage", "metric"):
        table.add_column(name)
    table.add_column("value", justify="right")
    table.add_column("gate", justify="right")
    table.add_column("status")
    for check in result.checks:
        gate = "equal" if check.threshold is None else f">= {check.threshold:g}"
        value = "equal" if check.exact else "-" if check.value is None else f"{check.value:.1f}"
        table.add_row(check.target, check.stage, check.metric, value, gate, status_text(check.status))
    out.print(table)
    figures = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("target", "stage", "measured"):
        figures.add_column(name)
    grouped: dict[tuple[str, str], list[str]] = {}
    for m in result.measurements:
        shown = f"{m.value:.3g}" if m.value is not None else "equal" if m.exact else "not a number"
        grouped.setdefault((m.target, m.stage), []).append(f"{m.metric} {shown}")
    for (target, stage), values in grouped.items():
        figures.add_row(target, stage, ", ".join(values))
    out.print()
    out.print(figures)
    for check in result.checks:
        if check.reason:
            err.print(f"{status_text(check.status)} {check.target} {check.stage}: {escape(check.reason)}")
    runs = sorted({c.executed_by for c in result.checks if c.executed_by})
    by = f", executed by {', '.join(runs)}" if runs else ""
    pictures = f"{num_questions} picture{'' if num_questions == 1 else 's'}"
    out.print(f"\n{status_text(result.status)} on {pictures}{by}", soft_wrap=True)
