"""What our commands have beyond Typer's: common flags, a plain usage line, examples, our kind of error."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fastvlm_convert.cli.flags import FLAG_PARAMETERS, Invocation, flags_among, flags_of_parameters
from fastvlm_convert.errors import UsageError, did_you_mean


class Command(TyperCommand):
    """A command with the common flags. Its epilog holds examples, one per line."""

    def __init__(self, *args: Any, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **settings)
        self.params = [*self.params, *FLAG_PARAMETERS]

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse, and keep the flags in the context: the command itself takes none of them."""
        invocation = ctx.ensure_object(Invocation)
        # As it was typed: `verify`, or `bundle vectors` where the command stands in a group.
        invocation.command = ctx.command_path.removeprefix(f"{ctx.find_root().info_name} ")
        with _our_errors(ctx):
            rest = super().parse_args(ctx, args)
        invocation.flags = flags_of_parameters(ctx.params)
        from fastvlm_convert.cli.console import use_color  # Rich, which the list of commands does without

        use_color(not invocation.flags.no_color)
        return rest

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Arguments as their metavars say, and the options that must be given."""
        pieces = []
        for parameter in self.params:
            if parameter.param_type_name == "argument":
                pieces.append(parameter.metavar or parameter.name.upper())
            elif parameter.required:
                pieces.append(f"{parameter.opts[0]} {parameter.metavar}")
        return [*pieces, "[OPTIONS]"]

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Arguments, then options, each under its metavar alone."""
        arguments, options = [], []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                arguments.append((parameter.metavar or parameter.name.upper(), record[1]))
            else:
                options.append(record)
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """The examples, never wrapped: they are there to be copied."""
        with formatter.section("Examples"):
            for line in (self.epilog or "").strip().splitlines():
                formatter.write(f"  {line.strip()}\n")


class Group(TyperGroup):
    """The program itself, or a group of its commands."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Take note of the flags before anything can fail."""
        ctx.ensure_object(Invocation).flags = flags_among(args)
        with _our_errors(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Find the command of a name.

        Raises:
            UsageError: There is none.
        """
        name = args[0]
        if name not in self.commands and not ctx.resilient_parsing:
            raise UsageError(
                f"No such command '{name}'",
                hint=f"{did_you_mean(name, self.commands)}commands: {', '.join(self.commands)}",
            )
        return super().resolve_command(ctx, args)


@contextmanager
def _our_errors(context: typer.Context) -> Iterator[None]:
    """Raises Typer's errors of parsing as ours.

    Raises:
        UsageError: The command line is not what the context's command takes.
    """
    try:
        yield
    except typer.TyperException as error:
        unknown = getattr(error, "option_name", "") if hasattr(error, "possibilities") else ""
        what = (error.message if unknown else error.format_message()).rstrip(".")
        raise UsageError(what, hint=_usage_hint(context, unknown)) from error


def _usage_hint(context: typer.Context, unknown: str) -> str:
    """What to do next; `unknown` is an option that there is not, or empty."""
    if isinstance(context.command, Group) and any(unknown in flag.opts for flag in FLAG_PARAMETERS):
        return f"{unknown} goes after the command"
    options = [name for parameter in context.command.params for name in parameter.opts]
    usage = " ".join([context.command_path, *context.command.collect_usage_pieces(context)])
    return f"{did_you_mean(unknown, options)}usage: {usage}; {context.command_path} -h explains it"
