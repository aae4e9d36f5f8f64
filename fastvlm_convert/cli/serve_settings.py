"""`serve --show-settings`: every setting with its value and where that is from."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from fastvlm_convert.cli.console import err, out, plain_table, report
from fastvlm_convert.cli.document import Document
from fastvlm_convert.cli.flags import flags_of
from fastvlm_convert.serve.setting_facts import SettingFacts

if TYPE_CHECKING:
    from fastvlm_convert.serve.settings_sources import LoadedSettings


@dataclass(frozen=True)
class ServeSettingsDocument(Document, name="serve-settings"):
    """The settings of the server, and where each is from; without what is in key files."""

    settings: tuple[SettingFacts, ...]


def show_settings(context: typer.Context, loaded: "LoadedSettings") -> None:
    """Print them as the command's flags ask for it."""
    from fastvlm_convert.serve.settings_sources import setting_facts

    facts = tuple(setting_facts(loaded))
    report(context, "passed", ServeSettingsDocument(facts), lambda: _print(facts, flags_of(context).quiet))


def _print(facts: tuple[SettingFacts, ...], quiet: bool) -> None:
    table = plain_table("setting", "value", "from")
    for setting in facts:
        value = setting.value if isinstance(setting.value, str) else json.dumps(setting.value)
        table.add_row(setting.name, escape(value or '""'), escape(setting.origin))
    out.print(table)
    if not quiet:
        err.print(
            "\nIn the environment: FAST_VLM_ and the name in capitals. In a file (--settings): the name. "
            "configs/serve.yaml says what each is.",
            soft_wrap=True,
        )
