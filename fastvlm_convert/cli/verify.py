"""`fastvlm-convert verify`: prove that a bundle answers as its checkpoint does."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import progress
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.options import AdapterOption, ImagesOption, ProjectorOption, VisionTowerOption
from fastvlm_convert.cli.output_format import OutputFormat, OutputFormatOption, report_outcomes
from fastvlm_convert.cli.verify_text import print_result, verdict_of
from fastvlm_convert.outcomes import Outcome
from fastvlm_convert.questions import hard_questions, read_questions
from fastvlm_convert.verification.bundle import VerifyResult, to_dict, verify
from fastvlm_convert.verification.check import Check
from fastvlm_convert.verification.diagnosis import nearest, share_used
from fastvlm_convert.verification.record import require_recordable, write_record

EXAMPLES = """
fastvlm-convert verify app --reference FastVLM-0.5B
fastvlm-convert verify app --reference FastVLM-0.5B --images photos --json
"""
_EXIT_CODES = {"passed": 0, "failed": 1, "not_run": 2}


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
    adapter: AdapterOption = None,
    projector: ProjectorOption = None,
    vision_tower: VisionTowerOption = None,
) -> None:
    """Check a bundle against the PyTorch reference.

    Compares every stage, from pixels to the text of the answer. Where one breaks its gate, it says which did
    first and what the likely cause is. The exit code is 1 if a check fails, and 2 if one could not be run.
    """
    if record:
        require_recordable(bundle)
    checkpoint = open_checkpoint(reference, adapter, projector=projector, vision_tower=vision_tower)
    questions = hard_questions() if images is None else read_questions(images)
    silent = flags_of(context).is_silent or output_format not in (None, OutputFormat.TEXT)
    with progress(silent) as on_stage:
        result = verify(bundle, checkpoint, questions=questions, interpret=interpret, on_progress=on_stage)
    recorded = write_record(bundle, result) if record else None
    warnings = (*questions.notes, *result.warnings)
    document = {
        "bundle": str(bundle),
        "recorded": None if recorded is None else str(recorded),
        "reference": str(reference),
        "questions": result.num_questions,
        "pictures": questions.num_pictures,
        **_document(result),
        "warnings": list(warnings),
    }
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
    raise typer.Exit(_EXIT_CODES[result.status])


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


def _document(result: VerifyResult) -> dict[str, Any]:
    """What was found, as plain data."""
    closest = nearest(result.checks)
    return {
        "checks": [to_dict(check) for check in result.checks],
        "measurements": [to_dict(measurement) for measurement in result.measurements],
        "nearest": None if closest is None else {**to_dict(closest), "share_used": share_used(closest)},
        "diagnoses": [asdict(diagnosis) for diagnosis in result.diagnoses],
        "answers": [asdict(answer) for answer in result.answers],
        "answer_figures": [asdict(figures) for figures in result.figures],
        "layers": [asdict(layer) for layer in result.layers],
        "first_divergence": {t: d and asdict(d) for t, d in result.first_divergence.items()},
    }
