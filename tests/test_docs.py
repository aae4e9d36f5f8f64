"""The pages are true in what can be checked: commands, paths and links."""

import importlib.util
import re
from pathlib import Path

import pytest
import typer

from fastvlm_convert.cli.main import app
from tests.commands import PAGES, ROOT, tool_commands

GROUP = typer.main.get_command(app)
COMMANDS = [(page.name, argv) for page in PAGES for argv in tool_commands(page)]
MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(("page", "argv"), COMMANDS, ids=lambda v: " ".join(v) if isinstance(v, tuple) else v)
def test_every_command_is_one_that_the_tool_takes(page, argv):
    """Parsed, not run: the places in it need not exist."""
    if argv[0].startswith("-"):
        assert argv[0] in GROUP.get_help(GROUP.make_context("fastvlm-convert", ["inspect"]))
        return
    context = GROUP.make_context("fastvlm-convert", list(argv))
    name, command, rest = GROUP.resolve_command(context, list(argv))
    if rest and hasattr(command, "commands"):
        context = command.make_context(name, rest, parent=context)
        name, command, rest = command.resolve_command(context, rest)
    if rest:
        assert command.make_context(name, rest, parent=context).params


def test_a_command_that_the_tool_does_not_take_is_noticed():
    context = GROUP.make_context("fastvlm-convert", ["inspect"])
    name, command, _ = GROUP.resolve_command(context, ["inspect"])
    with pytest.raises(Exception, match="No such option"):
        command.make_context(name, ["CHECKPOINT", "--fast"], parent=context)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    for path, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_path_and_make_target_exists(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?:python |`)((?:benchmarks|scripts|tests|training|configs)/[\w/.-]+)", text):
        assert (ROOT / path.rstrip(".")).exists(), path
    for name in re.findall(r"-m benchmarks\.(\w+)", text):
        assert importlib.util.find_spec(f"benchmarks.{name}"), name
    for targets in re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", text, re.MULTILINE):
        for name in targets.split():
            assert re.search(rf"^{name}:", MAKEFILE, re.MULTILINE), name


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in PAGES if page.parent == ROOT / "docs"} - {"README.md"}
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == pages
