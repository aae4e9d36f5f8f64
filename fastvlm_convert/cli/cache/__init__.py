"""`fastvlm-convert cache`: what is kept between runs. One module a command."""

from typing import Final

import typer

from fastvlm_convert.cli.commands import Entry, group_class

_EXIT_COULD_NOT_RUN: Final = 2

COMMANDS: Final = {
    "show": Entry("fastvlm_convert.cli.cache.show", "Show what is kept between runs, and where."),
    "clear": Entry("fastvlm_convert.cli.cache.clear", "Remove what is kept between runs, or some of it."),
}

app = typer.Typer(
    cls=group_class(COMMANDS), invoke_without_command=True, rich_markup_mode=None, add_completion=False
)


@app.callback()
def _group(context: typer.Context) -> None:
    """Show or remove what is kept between runs.

    COMMAND -h shows a command's options and examples.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(_EXIT_COULD_NOT_RUN)
