"""The flags are frozen: each new one is a decision, made here as well."""

import subprocess
import sys

import pytest
import typer

from fastvlm_convert.cli.bundle import COMMANDS as BUNDLE_COMMANDS
from fastvlm_convert.cli.cache import COMMANDS as CACHE_COMMANDS
from fastvlm_convert.cli.main import COMMANDS as PROGRAM_COMMANDS
from fastvlm_convert.cli.main import app

COMMON = {"--json", "--quiet", "-q", "--verbose", "-v", "--no-color"}
PARTS = {"--adapter", "--projector", "--vision-tower"}
FLAGS = {
    "inspect": {"CHECKPOINT", *PARTS, *COMMON},
    "run": {
        "MODEL", "[IMAGE]... QUESTION", "--messages", "--system", "--max-new-tokens", "--temperature",
        "--top-p", "--seed", "--target", *PARTS, *COMMON,
    },
    "chat": {
        "MODEL", "[IMAGE]...", "--system", "--max-new-tokens", "--temperature", "--top-p", "--seed",
        "--target", *PARTS, *COMMON,
    },
    "serve": {
        "BUNDLE...", "--host", "--port", "--target", "--engine", "--weight", "--settings", "--show-settings",
        *COMMON,
    },
    "plan": {"CHECKPOINT", "--target", "--recipe", "--max-memory", *PARTS, *COMMON},
    "quantize": {
        "CHECKPOINT", "--recipe", "--output", "-o", *PARTS, "--calibration", "--overwrite", "--no-cache",
        "--max-memory", *COMMON,
    },
    "export": {
        "CHECKPOINT", "--target", "--recipe", "--output", "-o", *PARTS, "--calibration", "--overwrite",
        "--no-cache", "--max-memory", *COMMON,
    },
    "verify": {
        "BUNDLE", "--reference", "--images", "--interpret", "--record", "--details", "--self-test",
        "--output-format", "--no-cache", *PARTS, *COMMON,
    },
    "evaluate": {
        "MODEL...", "--dataset", "--images", "--limit", "--instruction", "--target", "--max-new-tokens",
        "--min-accuracy", "--max-drop", "--output", "-o", "--overwrite", "--output-format", "--no-cache",
        *COMMON,
    },
    "bench": {
        "BUNDLE...", "--reference", "--new-tokens", "--trials", "--threads", "--import", "--measured-on",
        "--save-baseline", "--against", "--max-regression", "--any-machine", "--output-format", *COMMON,
    },
    "lint": {
        "[BUNDLE]", "--ios", "--android", "--onnxruntime", "--execution-provider", "--compute-units",
        "--strict", "--explain", "--output-format", *COMMON,
    },
    "estimate": {"BUNDLE", "--phones", *COMMON},
    "report": {
        "BUNDLE", "--output", "-o", "--evaluation", "--bench", "--images", "--overwrite", *COMMON,
    },
    "scan": {
        "CHECKPOINT", "--images", "--recipe", "--output", "-o", "--max-new-tokens", *PARTS, *COMMON,
    },
    "mil": {"FILE.mlpackage", "--profile", *COMMON},
    "recipes": {"[NAME]", "--schema", *COMMON},
    "doctor": {"[CHECKPOINT]", "--strict", *COMMON},
    "bundle check": {"BUNDLE", "--signature", "--public-key", *COMMON},
    "bundle diff": {"A", "B", *COMMON},
    "bundle pack": {"BUNDLE", "--for", "--output", "-o", "--overwrite", *COMMON},
    "bundle unpack": {"FILE", "--output", "-o", "--overwrite", *COMMON},
    "bundle sign": {"BUNDLE", "--key", *COMMON},
    "bundle constants": {"BUNDLE", "--language", "--output", "-o", "--target", "--overwrite", *COMMON},
    "bundle vectors": {"BUNDLE", "--output", "-o", "--target", "--overwrite", *COMMON},
    "cache show": {*COMMON},
    "cache clear": {"[KIND]...", "--older-than", "--stale", *COMMON},
}  # fmt: skip
ROOT = {"--version", "--install-completion", "--show-completion"}
TOP = typer.main.get_command(app).commands
COMMANDS = {
    f"{name} {inner}" if inner else name: command
    for name, top in TOP.items()
    for inner, command in getattr(top, "commands", {"": top}).items()
}


def test_commands():
    assert list(COMMANDS) == list(FLAGS)


def test_flags_of_the_program():
    assert {name for parameter in typer.main.get_command(app).params for name in parameter.opts} == ROOT


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name):
    found = set()
    for parameter in COMMANDS[name].params:
        is_option = parameter.param_type_name == "option"
        found |= {*parameter.opts, *parameter.secondary_opts} if is_option else {parameter.metavar}
    assert found - {"--help", "-h"} == FLAGS[name]


@pytest.mark.parametrize("name", FLAGS)
def test_each_is_explained(name):
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        assert parameter.help.endswith("."), parameter.name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_each_commands_own_help_says(name):
    outer, _, inner = name.partition(" ")
    entries = {"bundle": BUNDLE_COMMANDS, "cache": CACHE_COMMANDS}[outer] if inner else PROGRAM_COMMANDS
    assert COMMANDS[name].help.startswith(entries[inner or outer].summary)


def test_the_list_of_commands_imports_none_of_them_and_nothing_that_prints_results():
    code = (
        "import sys; from fastvlm_convert.cli.main import COMMANDS, main; main(['--help']);"
        "modules = {entry.module for entry in COMMANDS.values()} | {'numpy', 'rich', 'yaml', 'PIL'};"
        "print(sorted(modules & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
