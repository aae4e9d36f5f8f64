"""`fastvlm-convert scan`: do the activations fit into float16, and what repairs them if not?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape, render

from fastvlm_convert.amounts import count_text
from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.cli.console import err, out, plain_table, print_warnings, progress, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.cli.options import (
    AdapterOption,
    CheckpointArgument,
    ImagesOption,
    ProjectorOption,
    VisionTowerOption,
    complete_recipe,
)
from fastvlm_convert.errors import OutputError
from fastvlm_convert.float16.repairs import Repair, at_risk, needed_repairs, recipe_text, repaired_recipe
from fastvlm_convert.float16.report import MIN_HEADROOM, RangeReport, save_report
from fastvlm_convert.questions import read_questions, standard_questions
from fastvlm_convert.recipe import load_recipe
from fastvlm_convert.runtime.loaded import load_folded_reference
from fastvlm_convert.weights.storage import FLOAT16_MAX

EXAMPLES = """
fastvlm-convert scan FastVLM-0.5B --images photos
fastvlm-convert scan FastVLM-0.5B --recipe ios-int4 -o repaired.yaml
"""
_SHOWN = 12  # operations in the table

RecipeToJudgeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="Recipe whose float16 parts are judged.",
        autocompletion=complete_recipe,
    ),
]
RepairedRecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE.yaml",
        help="Write that recipe here, with the repairs that the model needs.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class ScanDocument(Document, name="scan"):
    """Whether a model's activations fit float16.

    Attributes:
        report: The range of every operation.
        repairs: What the recipe needs so that they do.
        unrepaired: Operations that no repair helps.
        saved_to: Where `export` finds the report; None where it could not be written.
        warnings: What the user should know.
        recipe: The repaired recipe's file, if one was asked for.
    """

    report: RangeReport
    repairs: tuple[Repair, ...]
    unrepaired: tuple[str, ...]
    saved_to: str | None
    warnings: tuple[str, ...]
    recipe: str | None


def command(
    context: typer.Context,
    checkpoint: CheckpointArgument,
    images: ImagesOption = None,
    recipe: RecipeToJudgeOption = "fp16",
    output: RepairedRecipeOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer in tokens.")] = 64,
    adapter: AdapterOption = None,
    projector: ProjectorOption = None,
    vision_tower: VisionTowerOption = None,
) -> None:
    """Check whether a model's activations fit float16.

    Runs the PyTorch reference and records the range of every operation. `export` reads the record and warns
    about operations at risk.
    """
    opened = open_checkpoint(checkpoint, adapter, projector=projector, vision_tower=vision_tower)
    settings = load_recipe(recipe)
    if output is not None:
        _check_output(output)
    questions = standard_questions() if images is None else read_questions(images)
    with progress(flags_of(context).is_silent) as on_stage:
        loaded, model = load_folded_reference(opened, lambda share: on_stage("reference", share))
        # After loading: it imports torch, whose absence `load_folded_reference` reports.
        from fastvlm_convert.float16.scan import scan

        ranges = scan(
            model, loaded, questions, opened.sha256, max_new_tokens, lambda share: on_stage("images", share)
        )
    path, warnings = _saved(ranges)
    warnings = (*questions.notes, *warnings)
    repairs = needed_repairs(ranges, settings)
    repaired = repaired_recipe(settings, settings.name if output is None else output.stem, repairs)
    left = [o.op for o in at_risk(ranges, repaired)]
    if output is not None:
        _write(output, recipe_text(repaired, repairs))
    document = ScanDocument(
        report=ranges,
        repairs=repairs,
        unrepaired=tuple(left),
        saved_to=None if path is None else str(path),
        warnings=warnings,
        recipe=None if output is None else str(output),
    )

    def show() -> None:
        print_warnings(warnings)
        _print_ranges(ranges)
        out.print(f"\n{_verdict(ranges)}", soft_wrap=True)
        _print_repairs(repairs, left, recipe)
        if path is not None:
            err.print(escape(f"saved to {path}, where `export` finds it"), soft_wrap=True)
        if output is not None:
            err.print(escape(f"wrote {output}"), soft_wrap=True)

    report(context, "passed", document, show, brief=render(_verdict(ranges)).plain)


def _saved(report: RangeReport) -> tuple[Path | None, tuple[str, ...]]:
    """Where the report is kept for `export`; or a warning, for what was measured is worth printing."""
    try:
        return save_report(report), ()
    except OSError as error:
        why = f"{error.strerror}, {error.filename}" if error.filename else error.strerror
        what = f"the result cannot be kept for `export` ({why}); FASTVLM_CONVERT_CACHE moves the cache"
        return None, (what,)


def _check_output(output: Path) -> None:
    if output.suffix not in (".yaml", ".yml"):
        raise OutputError("a recipe is a .yaml file", where=output, hint="give a name that ends in .yaml")
    if not output.parent.is_dir():
        raise OutputError("there is no such folder", where=output.parent, hint="make it first")
    if output.exists() or output.is_symlink():
        raise OutputError("the output exists", where=output, hint="choose another name, or remove it")


def _write(output: Path, text: str) -> None:
    try:
        with whole_file(output) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        hint = "see that there is room and that you may write there"
        raise OutputError(f"cannot write: {error.strerror}", where=output, hint=hint) from error


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


def _verdict(ranges: RangeReport) -> str:
    """In Rich's markup, as names of operations are plain words."""
    risky, total, on = ranges.risky(), len(ranges.ops), count_text(ranges.num_images, "image")
    if not risky:
        return f"[green]all {total} operations have at least {MIN_HEADROOM:.0f}x headroom[/] on {on}"
    names = ", ".join(o.op for o in risky)
    return (
        f"[bold red]{len(risky)} of {total} operations have less than {MIN_HEADROOM:.0f}x headroom[/] "
        f"on {on}: {names}"
    )


def _print_ranges(ranges: RangeReport) -> None:
    numbers = ("largest", f"headroom to {FLOAT16_MAX:.0f}", "flushed to zero")
    table = plain_table("operation", *numbers, right=numbers)
    for op in sorted(ranges.ops, key=lambda o: -o.max_abs)[:_SHOWN]:
        table.add_row(
            escape(op.op),
            f"{op.max_abs:.1f}",
            f"{op.headroom:.1f}x",
            f"{100 * op.flushed_share:.4f} %",
            style="bold red" if op.headroom < MIN_HEADROOM else "",
        )
    out.print(table)
