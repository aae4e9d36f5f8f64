"""`fastvlm-convert verify`: prove that a bundle answers as its checkpoint does."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import progress
from fastvlm_convert.cli.document import EXIT_CODES, Document
from fastvlm_convert.cli.options import (
    AdapterOption,
    ImagesOption,
    NoCacheOption,
    ProjectorOption,
    VisionTowerOption,
    cache_used,
)
from fastvlm_convert.cli.output_format import OutputFormatOption, is_silent, report_outcomes
from fastvlm_convert.cli.self_test import SelfTestOption, run_self_test
from fastvlm_convert.cli.verify_text import print_result, verdict_of
from fastvlm_convert.cli.waiting_threads import wait_passively
from fastvlm_convert.errors import UsageError
from fastvlm_convert.outcomes import Outcome
from fastvlm_convert.questions import hard_questions, read_questions
from fastvlm_convert.verification.answers import Answer, AnswerFigures
from fastvlm_convert.verification.bundle import VerifyResult, verify
from fastvlm_convert.verification.check import Check, Measurement
from fastvlm_convert.verification.diagnosis import Diagnosis, nearest, share_used
from fastvlm_convert.verification.layers import Divergence, LayerFigure
from fastvlm_convert.verification.record import require_recordable, write_record

EXAMPLES = """
fastvlm-convert verify app --reference FastVLM-0.5B
fastvlm-convert verify app --reference FastVLM-0.5B --images photos --json
"""


@dataclass(frozen=True)
class NearestCheck(Check):
    """The check that came nearest to its gate.

    Attributes:
        share_used: How much of what the gate allows is used.
    """

    share_used: float | None


@dataclass(frozen=True)
class VerifyDocument(Document, name="verify", statuses=("passed", "failed", "not_run")):
    """How closely a bundle follows its checkpoint.

    Attributes:
        bundle: The bundle's folder.
        recorded: The record that was written, if one was asked for.
        reference: The checkpoint's folder.
        questions: How many were asked.
        pictures: Distinct pictures in them.
        checks: Figures against their thresholds.
        measurements: Figures that gate nothing.
        nearest: The check that came nearest to its gate.
        diagnoses: Where each target that fails first breaks a gate, and why that may be.
        answers: Every answer of every execution, beside the reference's.
        answer_figures: The answers of each execution in figures.
        layers: Every operation of every execution whose values can be seen.
        first_divergence: By target, the first operation below its gate.
        warnings: What the user should know.
    """

    bundle: str
    recorded: str | None
    reference: str
    questions: int
    pictures: int
    checks: tuple[Check, ...]
    measurements: tuple[Measurement, ...]
    nearest: NearestCheck | None
    diagnoses: tuple[Diagnosis, ...]
    answers: tuple[Answer, ...]
    answer_figures: tuple[AnswerFigures, ...]
    layers: tuple[LayerFigure, ...]
    first_divergence: Mapping[str, Divergence | None]
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
    details: Annotated[bool, typer.Option("--details", help="Print every check and figure, too.")] = False,
    output_format: OutputFormatOption = None,
    self_test: SelfTestOption = False,
    adapter: AdapterOption = None,
    projector: ProjectorOption = None,
    vision_tower: VisionTowerOption = None,
    no_cache: NoCacheOption = False,
) -> None:
    """Check a bundle against the PyTorch reference.

    Compares every stage, from pixels to the text of the answer. Where one breaks its gate, it says which did
    first and what the likely cause is. The exit code is 1 if a check fails, and 2 if one could not be run.
    """
    wait_passively()
    if record and self_test:
        raise UsageError("a self-test records nothing", hint="leave out --self-test or --record")
    if record:
        require_recordable(bundle)
    checkpoint = open_checkpoint(reference, adapter, projector=projector, vision_tower=vision_tower)
    questions = hard_questions() if images is None else read_questions(images)
    if self_test:
        with cache_used(not no_cache):
            run_self_test(context, bundle, (reference, checkpoint), questions, interpret, output_format)
    with cache_used(not no_cache), progress(is_silent(context, output_format)) as on_stage:
        result = verify(bundle, checkpoint, questions=questions, interpret=interpret, on_progress=on_stage)
    recorded = write_record(bundle, result) if record else None
    warnings = (*questions.notes, *result.warnings)
    recorded_in = None if recorded is None else str(recorded)
    document = _document((str(bundle), recorded_in, str(reference)), questions.num_pictures, result, warnings)
    verdict = verdict_of(result, questions.num_pictures)
    report_outcomes(
        context,
        output_format,
        [_outcome(check) for check in result.checks],
        result.status,
        document,
        lambda: print_result(result, warnings, verdict, details=details),
        brief=verdict,
    )
    raise typer.Exit(EXIT_CODES[result.status])


def _document(
    paths: tuple[str, str | None, str], num_pictures: int, result: VerifyResult, warnings: tuple[str, ...]
) -> VerifyDocument:
    bundle, recorded, reference = paths
    closest = nearest(result.checks)
    return VerifyDocument(
        bundle=bundle,
        recorded=recorded,
        reference=reference,
        questions=result.num_questions,
        pictures=num_pictures,
        checks=result.checks,
        measurements=result.measurements,
        nearest=None if closest is None else _nearest(closest),
        diagnoses=result.diagnoses,
        answers=result.answers,
        answer_figures=result.figures,
        layers=result.layers,
        first_divergence=result.first_divergence,
        warnings=warnings,
    )


def _nearest(check: Check) -> NearestCheck:
    return NearestCheck(**asdict(check), share_used=share_used(check))


def _outcome(check: Check) -> Outcome:
    figure = "equal" if check.exact else "no figure" if check.value is None else f"{check.value:.4g}"
    gate = "" if check.threshold is None else f", gate {check.threshold:g}"
    return Outcome(
        id=f"{check.target}.{check.stage}.{check.metric}",
        severity="error",
        status=check.status,
        message=check.reason or f"{figure}{gate}",
        where=check.executed_by,
    )
