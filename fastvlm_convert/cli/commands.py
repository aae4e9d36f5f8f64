"""Which commands there are. Each is imported when it is first needed: all of them together take a second."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import typer

from fastvlm_convert.cli.typer_extension import Command, Group

_EXIT_COULD_NOT_RUN: Final = 2


@dataclass(frozen=True)
class Entry:
    """A command that need not be imported yet.

    Attributes:
        module: Has `command` and `EXAMPLES`, or `app` where it is a group of commands.
        summary: The first sentence of its help.
    """

    module: str
    summary: str


class LazyCommands(Mapping[str, Any]):
    """Commands and groups by name, in the order of a table; imported when they are looked up."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries
        self._imported: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401  Typer has no public type of both
        if name not in self._imported:
            self._imported[name] = _import(name, self.entries[name])
        return self._imported[name]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def group_class(entries: Mapping[str, Entry]) -> type[Group]:
    """The class of a group that has the commands of a table."""

    class LazyGroup(Group):
        def __init__(self, **settings: Any) -> None:  # noqa: ANN401
            super().__init__(**settings)
            self.commands = LazyCommands(entries)  # type: ignore[assignment]  # nothing is ever added

        def format_commands(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]  # noqa: ANN401
            """The commands and what they do, from the table alone."""
            with formatter.section("Commands"):
                formatter.write_dl([(name, entry.summary) for name, entry in entries.items()])

    return LazyGroup


def group_app(entries: Mapping[str, Entry], summary: str) -> typer.Typer:
    """A group of commands within the program; without one of them it prints its help."""
    app = typer.Typer(
        cls=group_class(entries), invoke_without_command=True, rich_markup_mode=None, add_completion=False
    )

    @app.callback(help=f"{summary}\n\nCOMMAND -h shows a command's options and examples.")
    def _group(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            typer.echo(context.get_help(), err=True)
            raise typer.Exit(_EXIT_COULD_NOT_RUN)

    return app


def _import(name: str, entry: Entry) -> Any:  # noqa: ANN401
    module = import_module(entry.module)
    if hasattr(module, "app"):
        group = typer.main.get_command(module.app)
        group.name = name
        return group
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    single.command(name, cls=Command, epilog=module.EXAMPLES)(module.command)
    return typer.main.get_command(single)
