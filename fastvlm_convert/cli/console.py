"""What the user sees: the result on standard output, everything else on standard error."""

import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import Invocation, flags_of
from fastvlm_convert.errors import ConversionError
from fastvlm_convert.progress import OnStage

_IS_TERMINAL: Final = sys.stdout is not None and sys.stdout.isatty()  # None where it is closed
_FILE_WIDTH: Final = 120  # a pipe or a log has no width; Rich would take 80

# No emoji: a path may well hold ":x:".
out = Console(highlight=False, emoji=False, width=None if _IS_TERMINAL else _FILE_WIDTH)
err = Console(stderr=True, highlight=False, emoji=False)

_TOGETHER: Final = "all of it"
_STATUS_STYLES = {"passed": "green", "failed": "bold red", "not_run": "yellow"}


def use_color(allowed: bool) -> None:
    """Allow colors, on a terminal or where FORCE_COLOR is set, or forbid them, as NO_COLOR does."""
    for console in (out, err):
        console.no_color = not allowed or os.environ.get("NO_COLOR", "") != ""


def report(
    context: typer.Context,
    status: str,
    document: Document,
    show: Callable[[], None],
    brief: str | None = None,
) -> None:
    """Print a command's result as its flags ask for it.

    Args:
        context: The command's.
        status: `passed`, `failed` or `not_run`.
        document: What `--json` prints.
        show: Prints it for people.
        brief: With `--quiet`: the one line to print; None where `show` prints the result and nothing else.
    """
    flags = flags_of(context)
    if flags.as_json:
        print_json(context.ensure_object(Invocation).command, status, document)
    elif flags.quiet and brief is not None:
        sys.stdout.write(f"{brief}\n")
    else:
        show()


def print_json(command: str | None, status: str, document: Document) -> None:
    """Print the one JSON document of a command."""
    # Not through Rich, which wraps at the width of the terminal; in ASCII, which every terminal can show.
    sys.stdout.write(json.dumps(_finite(document.to_dict(command, status)), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:  # noqa: ANN401
    """The same without NaN and infinity, which JSON does not have: null says that there is no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def print_error(error: ConversionError) -> None:
    """Print what went wrong and what to do next."""
    err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
    if error.hint:
        err.print(f"[cyan]hint:[/] {escape(error.hint)}", soft_wrap=True)


def print_warnings(warnings: tuple[str, ...]) -> None:
    """Print warnings, one a line."""
    for warning in warnings:
        err.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)


def plain_table(*columns: str, right: Collection[str] = (), wrap: Collection[str] = ()) -> Table:
    """A table without lines.

    Args:
        columns: Headings; none for a table of names and values.
        right: Columns to align right, as numbers are.
        wrap: Columns that alone give way on a narrow terminal; all do if empty.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=bool(columns))
    for name in columns:
        is_firm = bool(wrap) and name not in wrap
        justify: Any = "right" if name in right else "left"
        table.add_column(escape(name), justify=justify, no_wrap=is_firm, overflow="fold")
    return table


def status_text(status: str) -> str:
    """A status in its color."""
    return f"[{_STATUS_STYLES[status]}]{status}[/]"


@contextmanager
def progress(
    silent: bool, remaining: bool = False, together: Mapping[str, float] | None = None
) -> Iterator[OnStage]:
    """A bar for each stage on a terminal, nothing elsewhere; yields the callback that moves them.

    Args:
        silent: Show nothing in any case.
        remaining: Also estimate the time that is left; for stages of even steps.
        together: Stages that follow each other and take long, and the share of their time that each takes:
            they get a bar in common, which appears with the first of them and says what all of them need yet.
    """
    columns: list[ProgressColumn] = [
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    ]
    if remaining or together:
        columns += [TextColumn("left:"), TimeRemainingColumn()]
    disable = silent or not _can_animate()
    # A step of a stage may take a minute, and the speed is an average over those of ten.
    bars = Progress(*columns, console=err, transient=True, disable=disable, speed_estimate_period=600)
    tasks: dict[str, TaskID] = {}
    shares = together or {}

    def move(name: str, share: float) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=1.0)
        bars.update(tasks[name], completed=share)

    def on_stage(stage: str, share: float) -> None:
        if stage in shares:
            # Stages before the one that runs are done, those that had nothing to do among them.
            before = sum(list(shares.values())[: list(shares).index(stage)])
            move(_TOGETHER, (before + shares[stage] * share) / sum(shares.values()))
        move(stage, share)

    with bars:
        yield on_stage


@contextmanager
def waiting(text: str, silent: bool) -> Iterator[Callable[[], None]]:
    """A spinner on a terminal, nothing elsewhere; yields what ends it before the block does.

    Args:
        text: What the user waits for.
        silent: Show nothing in any case.
    """
    if silent or not _can_animate():
        yield lambda: None
        return
    with err.status(text) as status:
        yield status.stop


def _can_animate() -> bool:
    """Whether standard error is a terminal in truth: FORCE_COLOR makes Rich believe so of a file."""
    return err.is_terminal and sys.stderr.isatty()
