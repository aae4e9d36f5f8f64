"""What `--help` says, at the width of a plain terminal, and what the shell completes."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from fastvlm_convert.recipe import load_recipe, shipped_recipes
from tests.cli.test_flags import COMMANDS, FLAGS, TOP


@pytest.fixture(autouse=True)
def _terminal_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def section(text: str, title: str) -> list[str]:
    """The lines below a heading, up to the next empty line."""
    lines = text.splitlines()
    start = lines.index(f"{title}:") + 1
    end = lines.index("", start) if "" in lines[start:] else len(lines)
    return lines[start:end]


@pytest.mark.parametrize("group", ["", "bundle"])
def test_every_command_has_a_summary_that_fits(cli, group):
    commands = TOP[group].commands if group else TOP
    shown = section(cli(*group.split(), "--help").out, "Commands")
    assert [line.split()[0] for line in shown] == list(commands)
    for command, line in zip(commands.values(), shown, strict=True):
        assert line.split(maxsplit=1)[1] == command.help.splitlines()[0]
        assert line.endswith(".")
        assert not line.endswith("...")


def test_the_exit_codes_are_documented(cli):
    text = "Exit codes: 0 done, 1 a check failed, 2 could not run, 130 interrupted."
    assert text in cli("--help").out


@pytest.mark.parametrize("name", FLAGS)
class TestACommand:
    def test_it_fits(self, cli, name):
        for line in cli(*name.split(), "--help").out.splitlines():
            assert len(line) <= 80 or "fastvlm-convert" in line

    def test_metavars_say_what_they_are(self, cli, name):
        result = cli(*name.split(), "--help")
        assert not re.search(r"<[a-z]|[{}]|\[\[", result.out.replace("<image>", ""))
        if "--target" in FLAGS[name]:
            assert "--target onnx|coreml " in result.out

    def test_it_ends_with_two_examples_that_can_be_typed(self, cli, name):
        out = cli(*name.split(), "--help").out
        examples = section(out, "Examples")
        assert out.endswith("\n".join(examples) + "\n")
        assert len(examples) == 2
        for example in examples:
            assert len(example) <= 82
            words = shlex.split(example.partition(" > ")[0])
            arguments = words[1 + len(name.split()) :]
            assert words == ["fastvlm-convert", *name.split(), *arguments]
            context = COMMANDS[name].make_context(name, arguments)  # an option of its own would be an error
            if context.params.get("recipe"):
                load_recipe(context.params["recipe"])


def completed(words: str) -> list[str]:
    """What bash is told to complete the last word to."""
    environment = {
        **os.environ,
        "_FASTVLM_CONVERT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "fastvlm_convert"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_the_shell_completes_commands_recipes_and_targets():
    assert completed("fastvlm-convert ex") == ["export"]
    assert completed("fastvlm-convert export x --recipe ios-") == ["ios-ane", "ios-int4"]
    assert completed("fastvlm-convert recipes ") == list(shipped_recipes())
    assert completed("fastvlm-convert plan x --target c") == ["coreml"]
    assert completed("fastvlm-convert run x --target ") == ["onnx", "coreml"]
    assert "--quiet" in completed("fastvlm-convert scan x --q")


@pytest.mark.parametrize(("shell", "code"), [("bash", 0), ("tcsh", 2)])
def test_completion_is_installed(tmp_path, shell, code):
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fastvlm_convert", "--install-completion", shell],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    script = tmp_path / ".bash_completions" / "fastvlm-convert.sh"
    assert script.is_file() == (code == 0)
    if code == 0:
        assert "_FASTVLM_CONVERT_COMPLETE=complete_bash" in script.read_text()
