"""Entry point: the app, and the one place where errors become exit codes.

0: done, gates passed. 1: a gate failed, and nothing else. 2: could not run. 128 + the number of the signal
that ended it, after what is unfinished was removed: 129 hangup, 130 interrupt, 143 termination.
"""

import errno
import logging
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Annotated, Final, NoReturn

import typer

from fastvlm_convert import __version__
from fastvlm_convert.cli import bench, export, inspect, mil, plan, quantize, recipes, run, scan, verify
from fastvlm_convert.cli.console import err, print_error, print_json
from fastvlm_convert.cli.streams import guarded_streams
from fastvlm_convert.errors import ConversionError, OutputError

EXIT_COULD_NOT_RUN = 2
_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)

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
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # which nohup asks for
            signal.signal(number, _terminate)  # so that unfinished output is removed
    with guarded_streams():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        try:
            app(args=arguments)
        finally:
            sys.stdout.flush()  # a failure at Python's own exit could not be told any more
    except SystemExit as exit_:
        if isinstance(exit_.__context__, BrokenPipeError):  # Typer and Rich exit with 1, our "gate failed"
            return EXIT_COULD_NOT_RUN
        if exit_.code is None:
            return 0
        return exit_.code if isinstance(exit_.code, int) else EXIT_COULD_NOT_RUN
    except BrokenPipeError:
        return EXIT_COULD_NOT_RUN
    except ConversionError as error:
        _report(error, arguments)
        return EXIT_COULD_NOT_RUN
    except OSError as error:  # a full disk, or a folder that may not be searched, wherever it strikes
        what = f"cannot read or write: {error.strerror or error}"
        _report(ConversionError(what, where=error.filename, hint=_hint(error)), arguments)
        return EXIT_COULD_NOT_RUN
    except MemoryError:
        hint = "`fastvlm-convert plan` tells what an export needs"
        _report(ConversionError("there is not enough memory", hint=hint), arguments)
        return EXIT_COULD_NOT_RUN
    except Exception as error:  # noqa: BLE001  the last resort: without it Python's own exit code 1 would read "gate failed"
        traceback.print_exc()
        err.print(
            "[bold red]error:[/] this is a bug in fastvlm-convert; please report it with the lines above"
        )
        _print_error_document(arguments, message=f"internal error: {error!r}")
        return EXIT_COULD_NOT_RUN
    return 0


def _report(error: ConversionError, arguments: list[str]) -> None:
    if "--verbose" in arguments or "-v" in arguments:
        traceback.print_exc()
    print_error(error)
    _print_error_document(arguments, message=str(error), where=error.where, hint=error.hint)


def _print_error_document(arguments: list[str], **fields: str | None) -> None:
    if "--json" in arguments:
        with suppress(OSError, OutputError):  # standard output itself may be what fails
            print_json(arguments[0], "error", error=fields)


def _hint(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room, or write elsewhere; FASTVLM_CONVERT_CACHE moves the cache, TMPDIR temporary files"
    return "see that the path exists and that you may read and write there"


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)
