"""Where color and bars go, what `--quiet` leaves, and how tables give way."""

import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console

from fastvlm_convert.cli.console import plain_table
from tests.bundles import mixed_recipe, recipe, write_recipe
from tests.cli.conftest import CHECKPOINT, read_all
from tests.cli.test_plan import DEMO

FAILING = ("inspect", "no/such/folder")


def environment(**more: str) -> dict[str, str]:
    """The process's own, as on a terminal with colors, plus more."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    return {**kept, "TERM": "xterm-256color", **more}


def piped(*argv: object, **more: str) -> str:
    """Standard error in a file's place."""
    command = [sys.executable, "-m", "fastvlm_convert", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**more)).stderr


def on_terminal(*argv: object, **more: str) -> str:
    """Standard error on a terminal."""
    err, side = pty.openpty()
    command = [sys.executable, "-m", "fastvlm_convert", *map(str, argv)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=side, stdin=subprocess.DEVNULL, env=environment(**more)
    )
    os.close(side)
    shown = read_all(err).decode()
    process.wait()
    return shown


RED = "\x1b[1;31m"


def test_color_is_for_terminals_and_for_those_who_force_it():
    assert RED in on_terminal(*FAILING)
    assert "\x1b" not in piped(*FAILING)
    assert RED in piped(*FAILING, FORCE_COLOR="1")
    assert "\x1b" not in piped(*FAILING, FORCE_COLOR="")


@pytest.mark.parametrize(
    ("flags", "more"),
    [(["--no-color"], {}), ([], {"NO_COLOR": "1"}), (["--no-color"], {"FORCE_COLOR": "1"})],
)
def test_color_can_be_forbidden(flags, more):
    shown = on_terminal(*FAILING, *flags, **more)
    assert "there is no such checkpoint" in shown
    assert RED not in shown
    assert "\x1b[3" not in shown


def test_an_empty_no_color_forbids_nothing():
    assert RED in on_terminal(*FAILING, NO_COLOR="")


def test_usage_errors_heed_the_flag_too():
    assert RED in on_terminal("inspect", "--fast")
    assert RED not in on_terminal("inspect", "--fast", "--no-color")


EXPORT = ("export", CHECKPOINT, "--target", "onnx", "--recipe", "fp32", "-o")


def test_no_bar_reaches_a_file_that_is_called_a_terminal(tmp_path):
    shown = piped(*EXPORT, tmp_path / "b", FORCE_COLOR="1")
    assert "\x1b[33mwarning:" in shown
    assert "%" not in shown
    assert "\x1b[?25l" not in shown  # the cursor stays


def test_a_calibration_tells_what_all_of_it_needs_yet(tmp_path):
    few = write_recipe(recipe("int4", calibration={"num_samples": 4}), tmp_path / "few.yaml")
    shown = on_terminal("quantize", CHECKPOINT, "--recipe", few, "-o", tmp_path / "q", "--no-cache")
    lines = re.findall(r"all of it[^\r\n]*?(\d+)%[^\r\n]*left:[^\r\n]*", shown)
    assert [int(share) for share in lines] == sorted(int(share) for share in lines)
    assert lines[-1] == "100"
    assert re.search(r"layers +.*left:", shown)
    plain = on_terminal(*EXPORT, tmp_path / "b")
    assert "onnx" in plain
    assert "all of it" not in plain


@pytest.mark.parametrize("flag", ["--quiet", "-q", "--json"])
def test_no_bar_where_it_is_not_wanted(tmp_path, flag):
    assert on_terminal(*EXPORT, tmp_path / "b", flag) == ""


class TestQuiet:
    """Only what was made, or the verdict."""

    def test_export(self, cli, tmp_path):
        result = cli(*EXPORT, tmp_path / "b", "--quiet")
        assert (result.code, result.out, result.err) == (0, f"{tmp_path / 'b'}\n", "")

    def test_quantize(self, cli, tmp_path):
        recipe = write_recipe(mixed_recipe(), tmp_path / "mixed.yaml")
        result = cli("quantize", CHECKPOINT, "--recipe", recipe, "-o", tmp_path / "[q]", "-q")
        assert (result.code, result.out, result.err) == (0, f"{tmp_path / '[q]'}\n", "")

    def test_verify(self, cli, fp32_bundle, pictures):
        result = cli("verify", fp32_bundle, "--reference", CHECKPOINT, "--images", pictures, "-q")
        assert (result.code, result.out, result.err) == (0, "passed on 2 images\n", "")

    def test_bench(self, cli, fp32_bundle):
        result = cli("bench", fp32_bundle, "--trials", 1, "--new-tokens", 2, "-q")
        assert (result.code, result.err) == (0, "")
        assert result.out.startswith("fp32 onnx: first token ")
        assert result.out.endswith(" tok/s\n")
        assert result.out.count("\n") == 1

    def test_scan(self, cli, pictures, tmp_path, monkeypatch):
        monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(tmp_path / "cache"))
        result = cli("scan", CHECKPOINT, "--images", pictures, "--max-new-tokens", 1, "-q")
        assert (result.code, result.err) == (0, "")
        assert result.out.startswith("all ")
        assert result.out.endswith(" operations have at least 2x headroom on 2 images\n")

    def test_where_nothing_is_made_the_notes_are_left_out(self, cli, fp32_bundle):
        assert cli("recipes", "-q").err == ""
        assert cli("recipes", "-q").out == cli("recipes").out
        result = cli("run", fp32_bundle, "Hi", "--max-new-tokens", 2, "-q")
        assert (result.code, result.err) == (0, "")
        assert result.out.count("\n") == 1

    def test_errors_are_said_all_the_same(self, cli):
        assert cli("inspect", "no/such", "-q").err.startswith("error: ")

    def test_json_is_stronger(self, cli):
        assert cli("inspect", CHECKPOINT, "-q", "--json").document["status"] == "passed"


class TestTable:
    def shown(self, table, width: int) -> list[str]:
        console = Console(width=width)
        with console.capture() as capture:
            console.print(table)
        return capture.get().splitlines()

    def test_columns_and_no_lines(self):
        table = plain_table("name", "size", "[note]", right=("size",))
        table.add_row("a", "1", "x")
        table.add_row("bcd", "123456", "")
        assert [line.rstrip() for line in self.shown(table, 80)] == [
            "name    size  [note]",
            "a          1  x",
            "bcd   123456",
        ]

    def test_one_column_gives_way(self):
        table = plain_table("name", "text", wrap=("text",))
        table.add_row("a name of four", "some words that do not fit")
        lines = [line.rstrip() for line in self.shown(table, 30)]
        assert lines[1:] == ["a name of four  some words", " " * 16 + "that do not", " " * 16 + "fit"]

    def test_nothing_is_cut_off(self):
        table = plain_table("name")
        table.add_row("x" * 50)
        assert "".join(line.strip() for line in self.shown(table, 20)[1:]) == "x" * 50


@pytest.mark.parametrize(
    "command", [("recipes",), ("plan", DEMO, "--target", "onnx", "--target", "coreml", "--recipe", "int4")]
)
def test_tables_fit_80_columns(command):
    """Nothing is cut off by the two widest tables."""
    out, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvlm_convert", *map(str, command)],
        stdout=side, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=environment(COLUMNS="80"),
    )  # fmt: skip
    os.close(side)
    shown = read_all(out).decode()
    assert process.wait() == 0
    assert "\u2026" not in shown
    assert shown.count("\n") > 10
