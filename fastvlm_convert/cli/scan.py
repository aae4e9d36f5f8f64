"""`fastvlm-convert scan`: do the activations fit into float16?"""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fastvlm_convert.checkpoint.checkpoint import content_hash, open_checkpoint
from fastvlm_convert.cli.console import err, out, print_json, progress
from fastvlm_convert.cli.options import AdapterOption, CheckpointArgument, JsonOption, VerboseOption
from fastvlm_convert.fp16_range import FP16_MAX, MIN_HEADROOM, RangeReport, save_report
from fastvlm_convert.questions import read_questions
from fastvlm_convert.runtime.loaded import load_folded_reference

_SHOWN = 12


def command(
    checkpoint: CheckpointArgument,
    images: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Pictures to run, with an optional questions.json.", show_default=False
        ),
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of each answer.")] = 64,
    adapter: AdapterOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure every activation of the reference against float16's range; `export` reads the result."""
    opened = open_checkpoint(checkpoint, adapter)
    questions = read_questions(images)
    with progress(quiet=as_json) as on_stage:
        loaded, model = load_folded_reference(opened, lambda share: on_stage("reference", share))
        # After loading: it imports torch, whose absence `load_folded_reference` reports.
        from fastvlm_convert.verify.scan import scan

        report = scan(
            model,
            loaded,
            questions,
            content_hash(opened.files),
            max_new_tokens,
            lambda share: on_stage("pictures", share),
        )
    path = save_report(report)
    if as_json:
        print_json("scan", "passed", report=dataclasses.asdict(report), saved_to=str(path))
        return
    _print(report)
    err.print(f"kept in {path}; `export` reads it", soft_wrap=True)


def _print(report: RangeReport) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("operation")
    for name in ("largest", f"headroom to {FP16_MAX:.0f}", "flushed to zero"):
        table.add_column(name, justify="right")
    largest = sorted(report.ops, key=lambda o: -o.max_abs)[:_SHOWN]
    for op in largest:
        style = "bold red" if op.headroom < MIN_HEADROOM else ""
        table.add_row(
            escape(op.op),
            f"{op.max_abs:.1f}",
            f"{op.headroom:.1f}x",
            f"{100 * op.flushed_share:.4f} %",
            style=style,
        )
    out.print(table)
    risky = report.risky()
    verdict = (
        f"[bold red]{len(risky)} operations have less than {MIN_HEADROOM:.0f}x headroom[/]: "
        + ", ".join(o.op for o in risky)
        if risky
        else f"[green]every operation has at least {MIN_HEADROOM:.0f}x headroom[/]"
    )
    pictures = f"{report.num_images} picture{'' if report.num_images == 1 else 's'}"
    out.print(f"\n{verdict}, over {len(report.ops)} operations on {pictures}", soft_wrap=True)
