"""Entry point: the app, and the one place where errors become exit codes.

0: done, checks passed. 1: a check failed, and nothing else. 2: could not run. 128 + the number of the signal
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
from fastvlm_convert.cli.commands import Entry, group_class
from fastvlm_convert.cli.flags import Invocation
from fastvlm_convert.cli.streams import guarded_streams
from fastvlm_convert.errors import ConversionError, MissingDependencyError, OutputError

PROGRAM = "fastvlm-convert"
EXIT_CHECK_FAILED = 1
EXIT_COULD_NOT_RUN = 2
EXIT_INTERRUPTED = 130
_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)

COMMANDS: Final = {
    "inspect": Entry("fastvlm_convert.cli.inspect", "Show what a checkpoint contains."),
    "run": Entry("fastvlm_convert.cli.run", "Ask a checkpoint or a bundle about images."),
    "chat": Entry("fastvlm_convert.cli.chat", "Talk with a checkpoint or a bundle about images."),
    "serve": Entry("fastvlm_convert.cli.serve", "Answer questions about images over HTTP."),
    "plan": Entry("fastvlm_convert.cli.plan", "Predict an export: layers, file sizes and memory."),
    "quantize": Entry(
        "fastvlm_convert.cli.quantize", "Store a checkpoint's weights as integers, once for all exports."
    ),
    "export": Entry("fastvlm_convert.cli.export", "Convert a checkpoint to a bundle that an app can ship."),
    "verify": Entry("fastvlm_convert.cli.verify", "Check a bundle against the PyTorch reference."),
    "evaluate": Entry("fastvlm_convert.cli.evaluate", "Compare models on questions whose answers are known."),
    "bench": Entry(
        "fastvlm_convert.cli.bench", "Measure latency and memory, side by side or with a baseline."
    ),
    "lint": Entry(
        "fastvlm_convert.cli.lint", "Check a bundle against what is publicly known of its platform."
    ),
    "estimate": Entry("fastvlm_convert.cli.estimate", "Estimate what phones can do with a bundle at best."),
    "report": Entry("fastvlm_convert.cli.report", "Write one page that says what a bundle is worth."),
    "scan": Entry("fastvlm_convert.cli.scan", "Check whether a model's activations fit float16."),
    "mil": Entry("fastvlm_convert.cli.mil", "Show what is in a Core ML package, on any machine."),
    "recipes": Entry("fastvlm_convert.cli.recipes", "List the shipped recipes, or print one to start from."),
    "doctor": Entry("fastvlm_convert.cli.doctor", "Say what runs here, what cannot, and why."),
    "bundle": Entry(
        "fastvlm_convert.cli.bundle", "Check, compare, pack and sign bundles; feed an app's tests."
    ),
    "cache": Entry("fastvlm_convert.cli.cache", "Show or remove what is kept between runs."),
}

app = typer.Typer(
    name=PROGRAM,
    cls=group_class(COMMANDS),
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a check failed, 2 could not run, 130 interrupted.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Convert FastVLM checkpoints to Core ML and ONNX bundles, and verify them.

    COMMAND -h shows a command's options and examples.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(EXIT_COULD_NOT_RUN)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.simplefilter("ignore")  # libraries' warnings mean nothing to the user
    # Nor that there is no Core ML on Linux, that a TIFF tag is odd, or that fonts are looked for.
    for library in ("coremltools", "PIL", "matplotlib"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # which nohup asks for
            signal.signal(number, _terminate)  # so that unfinished output is removed
    with guarded_streams():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    invocation = Invocation()
    try:
        code = _call(arguments, invocation)
    except SystemExit as exit_:
        if isinstance(exit_.__context__, BrokenPipeError):  # Typer and Rich exit with 1, our "check failed"
            return EXIT_COULD_NOT_RUN
        if exit_.code in {128 + number for number in _SIGNALS}:
            _print_error_document(invocation, code="interrupted", message="interrupted")
        if exit_.code is None:
            return 0
        return exit_.code if isinstance(exit_.code, int) else EXIT_COULD_NOT_RUN
    except BrokenPipeError:
        return EXIT_COULD_NOT_RUN
    except ConversionError as error:
        _report(error, invocation)
        return EXIT_COULD_NOT_RUN
    except OSError as error:  # a full disk, or a folder that may not be searched, wherever it strikes
        what = f"cannot read or write: {error.strerror or error}"
        _report(ConversionError(what, where=error.filename, hint=_hint(error)), invocation)
        return EXIT_COULD_NOT_RUN
    except MemoryError:
        hint = "`fastvlm-convert plan` tells what an export needs"
        _report(ConversionError("there is not enough memory", hint=hint), invocation)
        return EXIT_COULD_NOT_RUN
    except Exception as error:  # noqa: BLE001  the last resort: without it Python's own exit code 1 would read "check failed"
        traceback.print_exc()
        from fastvlm_convert.cli.console import err

        err.print(
            "[bold red]error:[/] this is a bug in fastvlm-convert; please report it with the lines above"
        )
        _print_error_document(invocation, code="internal", message=f"internal error: {error!r}")
        return EXIT_COULD_NOT_RUN
    return _exit_code(code or 0, invocation)


def _call(arguments: list[str], invocation: Invocation) -> int | None:
    try:
        code: int | None = app(args=arguments, prog_name=PROGRAM, standalone_mode=False, obj=invocation)
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "this command") from error
    finally:
        sys.stdout.flush()  # a failure at Python's own exit could not be told any more
    return code


def _exit_code(code: int, invocation: Invocation) -> int:
    """What the process ends with, where Typer ended without an error of ours."""
    if code == EXIT_INTERRUPTED:
        _print_error_document(invocation, code="interrupted", message="interrupted")
    # Without a command it is Typer's own, of --install-completion for example, and no check of ours.
    return EXIT_COULD_NOT_RUN if code == EXIT_CHECK_FAILED and invocation.command is None else code


def _report(error: ConversionError, invocation: Invocation) -> None:
    if invocation.flags.verbose:
        traceback.print_exc()
    from fastvlm_convert.cli.console import print_error, use_color  # Rich is for those who have to be told

    use_color(not invocation.flags.no_color)
    print_error(error)
    _print_error_document(invocation, code=error.code, message=str(error), where=error.where, hint=error.hint)


def _print_error_document(
    invocation: Invocation, *, code: str, message: str, where: str | None = None, hint: str | None = None
) -> None:
    if invocation.flags.as_json:
        from fastvlm_convert.cli.console import print_json
        from fastvlm_convert.cli.document import ErrorDocument, ErrorFacts

        document = ErrorDocument(ErrorFacts(code, message, where, hint))
        with suppress(OSError, OutputError):  # standard output itself may be what fails
            print_json(invocation.command, "error", document)


def _hint(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room, or write elsewhere; FASTVLM_CONVERT_CACHE moves the cache, TMPDIR temporary files"
    return "see that the path exists and that you may read and write there"


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)
