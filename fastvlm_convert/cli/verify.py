"""`fastvlm-convert verify`: prove that a bundle answers as its checkpoint does."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import err, out, print_json, print_warnings, progress, status_text
from fastvlm_convert.cli.options import AdapterOption, JsonOption, VerboseOption
from fastvlm_convert.questions import read_questions, standard_questions
from fastvlm_convert.verification.bundle import VerifyResult, to_dict, verify
from fastvlm_convert.verification.check import Check

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
    checkpoint = open_checkpoint(reference, adapter)
    questions = standard_questions() if images is None else read_questions(images)
    with progress(quiet=as_json) as on_stage:
        result = verify(bundle, checkpoint, questions=questions, interpret=interpret, on_progress=on_stage)
    if as_json:
        print_json(
            "verify",
            result.status,
            bundle=str(bundle),
            reference=str(reference),
            questions=result.num_questions,
            checks=[to_dict(check) for check in result.checks],
            measurements=[to_dict(measurement) for measurement in result.measurements],
            warnings=list(result.warnings),
        )
    else:
        print_warnings(result.warnings)
        _print(result)
    raise typer.Exit(_EXIT_CODES[result.status])


_METRICS = {
    "psnr_db": "PSNR dB",
    "max_abs_error": "max abs",
    "cosine_similarity": "cosine",
    "kl_mean_nats": "KL mean",
    "kl_p99_nats": "KL p99",
    "top1_agreement": "top-1",
    "identical_share": "same text",
}


def _print(result: VerifyResult) -> None:
    out.print(_check_table(result))
    out.print()
    out.print(_measurement_table(result))
    for line in dict.fromkeys(_reason(check) for check in result.checks if check.reason):
        err.print(line, soft_wrap=True)
    pictures = f"{result.num_questions} picture{'' if result.num_questions == 1 else 's'}"
    out.print(f"\n{status_text(result.status)} on {pictures}", soft_wrap=True)
    if any((check.executed_by or "").startswith("interpreter") for check in result.checks):
        err.print("the interpreter proves the program and its weights, not Apple's kernels", soft_wrap=True)


def _reason(check: Check) -> str:
    by = f" ({check.executed_by})" if check.executed_by else ""
    return f"{status_text(check.status)} {check.target} {check.stage}{by}: {escape(check.reason or '')}"


def _check_table(result: VerifyResult) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("target", "stage", "metric"):
        table.add_column(name)
    for name in ("value", "gate"):
        table.add_column(name, justify="right")
    table.add_column("status")
    table.add_column("executed by")
    for check in result.checks:
        sign = "<=" if check.metric.endswith("_nats") else ">="
        exact = "-" if check.status == "not_run" else "equal"
        gate = exact if check.threshold is None else f"{sign} {check.threshold:g}"
        value = "equal" if check.exact else "-" if check.value is None else _shown(check.metric, check.value)
        by = check.executed_by or ""
        table.add_row(check.target, check.stage, check.metric, value, gate, status_text(check.status), by)
    return table


def _shown(metric: str, value: float) -> str:
    return f"{value:.1f}" if metric.endswith("_db") else f"{value:.3g}"


def _measurement_table(result: VerifyResult) -> Table:
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for m in result.measurements:
        shown = f"{m.value:.3g}" if m.value is not None else "equal" if m.exact else "not finite"
        rows.setdefault((m.target, m.stage, m.executed_by or ""), {})[m.metric] = shown
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("target", "stage"):
        table.add_column(name)
    used = [metric for metric in _METRICS if any(metric in row for row in rows.values())]
    for metric in used:
        table.add_column(_METRICS[metric], justify="right")
    table.add_column("executed by")
    for (target, stage, by), row in rows.items():
        table.add_row(target, stage, *(row.get(metric, "") for metric in used), by)
    return table
