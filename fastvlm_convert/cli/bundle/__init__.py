"""`fastvlm-convert bundle`: what can be done with a finished bundle. One module a command."""

import typer

from fastvlm_convert.cli.bundle import check, diff, pack, sign, unpack
from fastvlm_convert.cli.typer_extension import Command, Group

EXIT_COULD_NOT_RUN = 2

app = typer.Typer(cls=Group, invoke_without_command=True, rich_markup_mode=None)
for _name, _module in (
    ("check", check), ("diff", diff), ("pack", pack), ("unpack", unpack), ("sign", sign),
):  # fmt: skip
    app.command(_name, cls=Command, epilog=_module.EXAMPLES)(_module.command)


@app.callback()
def _group(context: typer.Context) -> None:
    """Check, compare, pack, unpack and sign bundles."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(EXIT_COULD_NOT_RUN)
