"""`fastvlm-convert cache`: what is kept between runs. One module a command."""

from typing import Final

from fastvlm_convert.cli.commands import Entry, group_app

COMMANDS: Final = {
    "show": Entry("fastvlm_convert.cli.cache.show", "Show what is kept between runs, and where."),
    "clear": Entry("fastvlm_convert.cli.cache.clear", "Remove what is kept between runs, or some of it."),
}

app = group_app(COMMANDS, "Show or remove what is kept between runs.")
