"""`fastvlm-convert scan`: do the activations fit into float16, and what repairs them if not?"""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import err, out, print_json, progress
from fastvlm_convert.cli.options import AdapterOption, CheckpointArgument, JsonOption, VerboseOption
from fastvlm_convert.errors import OutputError
from fastvlm_convert.float16.repairs import Repair, at_risk, needed_repairs, recipe_text, repaired_recipe
from fastvlm_convert.float16.report import MIN_HEADROOM, RangeReport, save_report
from fastvlm_convert.questions import read_questions, standard_questions
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.runtime.loaded import load_folded_reference
from fastvlm_convert.weights.storage import FLOAT16_MAX

_SHOWN = 12


def command(
    checkpoint: CheckpointArgument,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Pictures to run, with an optional questions.json; 16 generated ones by default.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Recipe whose precisions are judged.")
    ] = "fp16",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.yaml",
            help="Write that recipe with the repairs that the model needs.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of each answer.")] = 64,
    adapter: AdapterOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure every activation of the reference against float16's range; `export` reads the result."""
    opened = open_checkpoint(checkpoint, adapter)
    settings = load_recipe(recipe)
    if output is not None:
        _check_output(output)
    questions = standard_questions() if images is None else read_questions(images)
    with progress(quiet=as_json) as on_stage:
        loaded, model = load_folded_reference(opened, lambda share: on_stage("reference", share))
        # After loading: it imports torch, whose absence `load_folded_reference` reports.
        from fastvlm_convert.float16.scan import scan

        report = scan(
            model,
            loaded,
            questions,
            opened.sha256,
            max_new_tokens,
            lambda share: on_stage("pictures", share),
        )
    path = save_report(report)
    repairs = needed_repairs(report, settings)
    repaired = repaired_recipe(settings, settings.name if output is None else output.stem, repairs)
    left = [o.op for o in at_risk(report, repaired)]
    if output is not None:
        _write(output, recipe_text(repaired, repairs))
    if as_json:
        print_json(
            "scan",
            "passed",
            report=dataclasses.asdict(report),
            repairs=[dataclasses.asdict(repair) for repair in repairs],
            unrepaired=left,
            saved_to=str(path),
            recipe=None if output is None else str(output),
        )
        return
    _print(report)
    _print_repairs(repairs, left, recipe)
    err.print(f"kept in {path}; `export` reads it", soft_wrap=True)
    if output is not None:
        err.print(escape(f"wrote {output}"), soft_wrap=True)


def _check_output(output: Path) -> None:
    if output.suffix not in (".yaml", ".yml"):
        raise OutputError("a recipe is a .yaml file", where=output)
    if not output.parent.is_dir():
        raise OutputError("there is no such folder", where=output.parent)
    if output.exists() or output.is_symlink():
        raise OutputError("the output exists", where=output, hint="choose another name, or remove it")


def _write(output: Path, text: str) -> None:
    try:
        with whole_file(output) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write: {error.strerror}", where=output) from error


def _print_repairs(repairs: tuple[Repair, ...], left: list[str], recipe: str) -> None:
    if not repairs:
        out.print(f"recipe {escape(recipe)} needs no repairs", soft_wrap=True)
    for repair in repairs:
        value = repair.value if isinstance(repair.value, int) else list(repair.value)
        out.print(escape(f"repairs.{repair.setting}: {value}, because {repair.reason}"), soft_wrap=True)
    if left:
        out.print(
            f"[bold red]no repair helps[/] {', '.join(left)}; keep them in float32 (float32_ops)",
            soft_wrap=True,
        )


def _print(report: RangeReport) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("operation")
    for name in ("largest", f"headroom to {FLOAT16_MAX:.0f}", "flushed to zero"):
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
