"""`fastvlm-convert verify`: prove that a bundle answers as its checkpoint does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import (
    err,
    images_text,
    out,
    plain_table,
    print_warnings,
    progress,
    report,
    status_text,
)
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.options import AdapterOption, ImagesOption, ProjectorOption, VisionTowerOption
from fastvlm_convert.cli.self_test import SelfTestOption, run_self_test
from fastvlm_convert.errors import UsageError
from fastvlm_convert.questions import every_second_badly_taken, read_questions, standard_questions
from fastvlm_convert.verification.bundle import VerifyResult, verify
from fastvlm_convert.verification.check import Check, Measurement
from fastvlm_convert.verification.record import require_recordable, write_record

EXAMPLES = """
fastvlm-convert verify app --reference FastVLM-0.5B
fastvlm-convert verify app --reference FastVLM-0.5B --images photos --json
"""
_EXIT_CODES = {"passed": 0, "failed": 1, "not_run": 2}


@dataclass(frozen=True)
class VerifyDocument(Document, name="verify", statuses=("passed", "failed", "not_run")):
    """How closely a bundle follows its checkpoint.

    Attributes:
        bundle: The bundle's folder.
        recorded: The record that was written, if one was asked for.
        reference: The checkpoint's folder.
        questions: How many were asked.
        checks: Figures against their thresholds.
        measurements: Figures that gate nothing.
        warnings: What the user should know.
    """

    bundle: str
    recorded: str | None
    reference: str
    questions: int
    checks: tuple[Check, ...]
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...]


def command(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.", show_default=False)],
    reference: Annotated[
        Path,
        typer.Option(metavar="CHECKPOINT", help="Checkpoint that it was made from.", show_default=False),
    ],
    images: ImagesOption = None,
    interpret: Annotated[
        bool, typer.Option("--interpret", help="On a Mac, run Core ML packages in the interpreter too.")
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Write what was found into BUNDLE/verification.json.")
    ] = False,
    self_test: SelfTestOption = False,
    adapter: AdapterOption = None,
    projector: ProjectorOption = None,
    vision_tower: VisionTowerOption = None,
) -> None:
    """Check a bundle against the PyTorch reference.

    Compares every stage, from pixels to the text of the answer. The exit code is 1 if a check fails, and 2 if
    one could not be run.
    """
    if record and self_test:
        raise UsageError("a self-test records nothing", hint="leave out --self-test or --record")
    if record:
        require_recordable(bundle)
    checkpoint = open_checkpoint(reference, adapter, projector=projector, vision_tower=vision_tower)
    questions = every_second_badly_taken(standard_questions()) if images is None else read_questions(images)
    if self_test:
        run_self_test(context, bundle, (reference, checkpoint), questions, interpret)
    with progress(flags_of(context).is_silent) as on_stage:
        result = verify(bundle, checkpoint, questions=questions, interpret=interpret, on_progress=on_stage)
    recorded = write_record(bundle, result) if record else None
    warnings = (*questions.notes, *result.warnings)
    document = VerifyDocument(
        bundle=str(bundle),
        recorded=None if recorded is None else str(recorded),
        reference=str(reference),
        questions=result.num_questions,
        checks=result.checks,
        measurements=result.measurements,
        warnings=warnings,
    )
    verdict = f"{result.status} on {images_text(result.num_questions)}"
    report(context, result.status, document, lambda: _print(result, warnings, verdict), brief=verdict)
    raise typer.Exit(_EXIT_CODES[result.status])


_METRICS = {
    "sqnr_db": "SQNR dB",
    "psnr_db": "PSNR dB",
    "max_abs_error": "max abs",
    "cosine_similarity": "cosine",
    "kl_mean_nats": "KL mean",
    "kl_p99_nats": "KL p99",
    "top1_agreement": "top-1",
    "identical_share": "same text",
}


def _print(result: VerifyResult, warnings: tuple[str, ...], verdict: str) -> None:
    print_warnings(warnings)
    out.print(_check_table(result))
    _print_measurements(result)
    for line in dict.fromkeys(_reason(check) for check in result.checks if check.reason):
        err.print(line, soft_wrap=True)
    colored = verdict.replace(result.status, status_text(result.status), 1)
    out.print(f"\n{colored}", soft_wrap=True)
    if any((check.executed_by or "").startswith("interpreter") for check in result.checks):
        err.print(
            "The interpreter runs the package's program on its weights; it cannot test Apple's own kernels.",
            soft_wrap=True,
        )


def _reason(check: Check) -> str:
    by = f" ({check.executed_by})" if check.executed_by else ""
    return f"{status_text(check.status)} {check.target} {check.stage}{by}: {escape(check.reason or '')}"


def _check_table(result: VerifyResult) -> Table:
    numbers = ("value", "gate")
    table = plain_table("target", "stage", "metric", *numbers, "status", "executed by", right=numbers)
    for check in result.checks:
        sign = "<=" if check.metric.endswith(("_nats", "max_abs")) else ">="
        exact = "-" if check.status == "not_run" else "equal"
        gate = exact if check.threshold is None else f"{sign} {check.threshold:g}"
        value = "equal" if check.exact else "-" if check.value is None else _shown(check.metric, check.value)
        by = check.executed_by or ""
        table.add_row(check.target, check.stage, check.metric, value, gate, status_text(check.status), by)
    return table


def _shown(metric: str, value: float) -> str:
    return f"{value:.1f}" if metric.endswith("_db") else f"{value:.3g}"


def _print_measurements(result: VerifyResult) -> None:
    """A table for each target and what executed it: one for all is too wide for a terminal."""
    groups: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for m in result.measurements:
        shown = f"{m.value:.3g}" if m.value is not None else "equal" if m.exact else "not finite"
        stages = groups.setdefault((m.target, m.executed_by or ""), {})
        stages.setdefault(m.stage, {})[_METRICS.get(m.metric, m.metric)] = shown
    for (target, by), stages in groups.items():
        used = [name for name in _METRICS.values() if any(name in row for row in stages.values())]
        table = plain_table("stage", *used, right=used)
        for stage, row in stages.items():
            table.add_row(stage, *(row.get(name, "") for name in used))
        out.print(f"\n[bold]{target}[/]{f', executed by {escape(by)}' if by else ''}", soft_wrap=True)
        out.print(table)
