"""`--output-format`, on a command that does nothing but report."""

import json
import xml.etree.ElementTree as ET

import pytest
import typer

from fastvlm_convert.cli.flags import Invocation
from fastvlm_convert.cli.output_format import OutputFormatOption, report_outcomes
from fastvlm_convert.cli.typer_extension import Command, Group
from fastvlm_convert.errors import UsageError
from fastvlm_convert.outcomes import Outcome

OUTCOMES = (Outcome("a", "error", "failed", "broken", "b.onnx"),)

app = typer.Typer(cls=Group, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """A program."""


@app.command("probe", cls=Command, epilog="")
def probe(context: typer.Context, output_format: OutputFormatOption = None) -> None:
    """Report."""
    report_outcomes(
        context, output_format, OUTCOMES, "failed", {"found": 1}, lambda: typer.echo("shown"), "brief"
    )


@pytest.fixture
def run(capsys):
    """What a call prints."""

    def call(*arguments: str) -> str:
        app(args=["probe", *arguments], standalone_mode=False, obj=Invocation())
        return capsys.readouterr().out

    return call


def test_each_format(run):
    assert run() == run("--output-format", "text") == "shown\n"
    assert run("-q") == "brief\n"
    assert run("--output-format", "github") == "::error title=a::b.onnx: broken\n"
    suite = ET.fromstring(run("--output-format=junit")).find("testsuite")
    assert (suite.get("name"), suite.get("failures")) == ("probe", "1")


def test_json_is_what_the_flag_prints(run):
    document = run("--json")
    assert json.loads(document)["found"] == 1
    assert run("--output-format", "json") == run("--output-format=json", "--json") == document


@pytest.mark.parametrize("other", ["text", "github", "junit"])
def test_two_formats_exclude_each_other(run, other):
    with pytest.raises(UsageError, match="exclude each other"):
        run("--json", "--output-format", other)


def test_an_unknown_format_is_refused(run):
    with pytest.raises(UsageError, match="xml"):
        run("--output-format", "xml")


def test_errors_are_json_too(run):
    invocation = Invocation()
    with pytest.raises(UsageError):
        app(args=["probe", "--output-format", "json", "--bad"], standalone_mode=False, obj=invocation)
    assert invocation.flags.as_json
