"""`fastvlm-convert bundle ...`: what there is to do with a bundle that is made."""

from typing import Final

import typer

from fastvlm_convert.cli.bundle import constants, vectors
from fastvlm_convert.cli.typer_extension import Command, Group

_EXIT_COULD_NOT_RUN: Final = 2

app = typer.Typer(cls=Group, invoke_without_command=True, rich_markup_mode=None)
for _name, _module in (("constants", constants), ("vectors", vectors)):
    app.command(_name, cls=Command, epilog=_module.EXAMPLES)(_module.command)


@app.callback()
def _group(context: typer.Context) -> None:
    """Make what an app needs beside a bundle.

    COMMAND -h shows a command's options and examples.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(_EXIT_COULD_NOT_RUN)
