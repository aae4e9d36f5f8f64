"""`fastvlm-convert bundle`: what can be done with a finished bundle. One module a command."""

from typing import Final

import typer

from fastvlm_convert.cli.bundle import check, constants, diff, pack, sign, unpack, vectors
from fastvlm_convert.cli.typer_extension import Command, Group

_EXIT_COULD_NOT_RUN: Final = 2

app = typer.Typer(cls=Group, invoke_without_command=True, rich_markup_mode=None)
for _name, _module in (
    ("check", check), ("diff", diff), ("pack", pack), ("unpack", unpack), ("sign", sign),
    ("constants", constants), ("vectors", vectors),
):  # fmt: skip
    app.command(_name, cls=Command, epilog=_module.EXAMPLES)(_module.command)


@app.callback()
def _group(context: typer.Context) -> None:
    """Check, compare, pack and sign bundles; feed an app's tests.

    COMMAND -h shows a command's options and examples.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(_EXIT_COULD_NOT_RUN)
