"""Entry point: the app, and the one place where errors become exit codes.

0: done, gates passed. 1: a gate failed. 2: could not run. 130: interrupted.
"""

import logging
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from fastvlm_convert import __version__
from fastvlm_convert.cli import bench, export, inspect, mil, plan, quantize, recipes, run, scan, verify
from fastvlm_convert.cli.console import err, print_error, print_json
from fastvlm_convert.errors import ConversionError, MissingDependencyError

EXIT_COULD_NOT_RUN = 2

app = typer.Typer(
    name="fastvlm-convert",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _module in (
    ("inspect", inspect), ("run", run), ("plan", plan), ("quantize", quantize), ("export", export),
    ("verify", verify), ("bench", bench), ("scan", scan), ("mil", mil), ("recipes", recipes),
):  # fmt: skip
    app.command(_name)(_module.command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastvlm-convert {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Convert FastVLM checkpoints to verified ONNX bundles."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.simplefilter("ignore")  # libraries' warnings mean nothing to the user
    for library in ("coremltools", "PIL"):  # nor that there is no Core ML on Linux, or a TIFF tag is odd
        logging.getLogger(library).setLevel(logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr):
        _escape_what_the_terminal_cannot_show(stream)
    signal.signal(signal.SIGTERM, _terminate)  # so that unfinished output is removed
    try:
        _run(arguments)
    except SystemExit as exit_:
        if isinstance(exit_.__context__, BrokenPipeError):  # Typer and Rich exit with 1, our "gate failed"
            return EXIT_COULD_NOT_RUN
        return exit_.code if isinstance(exit_.code, int) else EXIT_COULD_NOT_RUN
    except ConversionError as error:
        _report(error, arguments)
        return EXIT_COULD_NOT_RUN
    except Exception as error:  # noqa: BLE001  the last resort: without it Python's own exit code 1 would read "gate failed"
        traceback.print_exc()
        err.print(
            "[bold red]error:[/] this is a bug in fastvlm-convert; please report it with the lines above"
        )
        _print_error_document(arguments, message=f"internal error: {error!r}")
        return EXIT_COULD_NOT_RUN
    return 0


def _run(arguments: list[str]) -> None:
    try:
        app(args=arguments)
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "this command") from error


def _report(error: ConversionError, arguments: list[str]) -> None:
    if "--verbose" in arguments or "-v" in arguments:
        traceback.print_exc()
    print_error(error)
    _print_error_document(arguments, message=str(error), where=error.where, hint=error.hint)


def _print_error_document(arguments: list[str], **fields: str | None) -> None:
    if "--json" in arguments:
        with suppress(OSError):  # standard output itself may be what fails
            print_json(arguments[0], "error", error=fields)


def _escape_what_the_terminal_cannot_show(stream: Any) -> None:  # noqa: ANN401
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)
