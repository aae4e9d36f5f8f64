"""The flags that every command has, and how a command reads them.

They are found even on a command line that cannot be understood: with `--json` its error is JSON too.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

import typer

_FORMAT: Final = "output_format"


@dataclass(frozen=True)
class Flags:
    """How a command reports.

    Attributes:
        as_json: One JSON document on standard output instead of text.
        quiet: Only the path of what was made, or the verdict; nothing but errors on standard error.
        verbose: Show the traceback of an error.
        no_color: No colors, even on a terminal.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    no_color: bool = False

    @property
    def is_silent(self) -> bool:
        """Whether standard error is for errors alone."""
        return self.as_json or self.quiet


@dataclass
class Invocation:
    """What `main` has to know to report an error, filled in while the command line is parsed.

    Attributes:
        command: Name of the command, or None until one is recognized.
        flags: Its flags.
    """

    command: str | None = None
    flags: Flags = Flags()


def flags_of(context: typer.Context) -> Flags:
    """The flags that a command was called with."""
    return context.ensure_object(Invocation).flags


def _declare(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only the result (a path, a verdict), no warnings.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.")] = False,
    no_color: Annotated[
        bool, typer.Option("--no-color", help="Print without colors, like setting NO_COLOR.")
    ] = False,
    output_format: Annotated[str, typer.Option("--output-format")] = "",
) -> None:
    """Never called: Typer reads the options off the signature."""


_app = typer.Typer(
    add_completion=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
_app.command()(_declare)
_parser = typer.main.get_command(_app)

# `--output-format` is an option of some commands alone (see `output_format.py`): here it is only understood.
FLAG_PARAMETERS: Final = tuple(option for option in _parser.params if option.name != _FORMAT)


def flags_of_parameters(parameters: MutableMapping[str, Any]) -> Flags:
    """Take the flags out of a command's parameters; `--output-format json` is another name for `--json`."""
    flags = Flags(**{flag.name: bool(parameters.pop(flag.name)) for flag in FLAG_PARAMETERS})
    return replace(flags, as_json=flags.as_json or parameters.get(_FORMAT) == "json")


def flags_among(arguments: Sequence[str]) -> Flags:
    """The flags on a command line, whatever else is on it."""
    return flags_of_parameters(_parser.make_context("flags", list(arguments), resilient_parsing=True).params)
