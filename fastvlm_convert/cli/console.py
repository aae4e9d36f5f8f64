"""What the user sees: the result on standard output, everything else on standard error."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fastvlm_convert.errors import ConversionError

JSON_SCHEMA_VERSION: Final = 1

OnStage = Callable[[str, float], None]

_IS_TERMINAL: Final = sys.stdout is not None and sys.stdout.isatty()  # None where it is closed
_FILE_WIDTH: Final = 120  # a pipe or a log has no width; Rich would take 80

# No emoji: a path may well hold ":x:".
out = Console(highlight=False, emoji=False, width=None if _IS_TERMINAL else _FILE_WIDTH)
err = Console(stderr=True, highlight=False, emoji=False)

_STATUS_STYLES = {"passed": "green", "failed": "bold red", "not_run": "yellow"}


def print_json(command: str, status: str, **fields: Any) -> None:  # noqa: ANN401
    """Print the one JSON document of a command."""
    document = {"schema_version": JSON_SCHEMA_VERSION, "command": command, "status": status, **fields}
    # Not through Rich, which wraps at the width of the terminal; in ASCII, which every terminal can show.
    sys.stdout.write(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n")


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


def status_text(status: str) -> str:
    """A status in its colour."""
    return f"[{_STATUS_STYLES[status]}]{status}[/]"


def size_text(count: float) -> str:
    """A number of bytes for people: decimal units, as phones and stores count."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.{1 if count < 100 * factor else 0}f} {unit}"
    return f"{count:.0f} B"


@contextmanager
def progress(quiet: bool) -> Iterator[OnStage]:
    """A bar a stage on a terminal, nothing elsewhere; yields the callback that moves them.

    Args:
        quiet: Show nothing in any case.
    """
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    bars = Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal)
    tasks: dict[str, TaskID] = {}

    def on_stage(stage: str, share: float) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=1.0)
        bars.update(tasks[stage], completed=share)

    with bars:
        yield on_stage


@contextmanager
def waiting(text: str, quiet: bool) -> Iterator[Callable[[], None]]:
    """A spinner on a terminal, nothing elsewhere; yields what ends it before the block does.

    Args:
        text: What the user waits for.
        quiet: Show nothing in any case.
    """
    if quiet or not err.is_terminal:
        yield lambda: None
        return
    with err.status(text) as status:
        yield status.stop
