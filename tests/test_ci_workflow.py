"""The workflow of docs/ci.md, executed on the demo checkpoint as far as it can be without GitHub."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fastvlm_convert.recipe import load_recipe
from tests.cli.test_flags import COMMANDS
from tests.commands import ROOT
from tests.published_schema import problems_of_document

FILE = ROOT / "examples" / "ci" / "fastvlm.yml"
PAGE = ROOT / "docs" / "ci.md"
# https://json.schemastore.org/github-workflow.json without its descriptions.
SCHEMA = ROOT / "tests" / "data" / "github-workflow.schema.json"
WORKFLOW: dict[str, Any] = yaml.load(FILE.read_text(), yaml.BaseLoader)  # `on` stays a word
(JOB,) = WORKFLOW["jobs"].values()

# Why a step is not executed here.
SKIPPED = {
    "actions/checkout@v4": "this clone is the repository",
    "actions/setup-python@v5": "the interpreter of the tests",
    "actions/cache/restore@v4": "GitHub's cache; the folder out/accepted stands for it",
    "actions/cache/save@v4": "GitHub's cache",
    "actions/upload-artifact@v4": "GitHub's storage",
    "Install fastvlm-convert": "needs the network; the tests' environment has it",
}
CONDITIONS = {"${{ !cancelled() }}", "github.ref == 'refs/heads/main'"}


@dataclass(frozen=True)
class Step:
    """A step that was executed."""

    name: str
    code: int
    output: str


def is_executed(step: dict[str, Any]) -> bool:
    return "run" in step and step["name"] not in SKIPPED


def commands() -> set[str]:
    """Our commands in it: `bundle check` where it is one of a group."""
    found = set()
    for step in JOB["steps"]:
        for text in step.get("run", "").split("fastvlm-convert ")[1:]:
            name, inner = text.split()[:2]
            found.add(f"{name} {inner}" if name == "bundle" else name)
    return found


class TestFile:
    def test_the_page_shows_it(self):
        assert f"```yaml\n{FILE.read_text()}```" in PAGE.read_text()

    def test_it_follows_githubs_schema(self):
        schema = json.loads(SCHEMA.read_text())
        value = yaml.safe_load(FILE.read_text())
        value["on"] = value.pop(True)  # which YAML 1.1 makes of the word
        validator = jsonschema.Draft7Validator(schema)
        assert [error.message for error in validator.iter_errors(value)] == []
        value["jobs"]["bundle"]["step"] = value["jobs"]["bundle"].pop("steps")
        assert not validator.is_valid(value)

    def test_every_step_is_executed_or_skipped_for_a_reason(self):
        skipped = {s.get("uses", s.get("name")) for s in JOB["steps"] if not is_executed(s)}
        assert skipped == set(SKIPPED)
        assert {s["if"] for s in JOB["steps"] if "if" in s} == CONDITIONS

    def test_its_commands_are_ours(self):
        assert commands() <= set(COMMANDS)


def execute(folder: Path, only: str | None = None, **variables: str) -> list[Step]:
    """The steps in order, or one alone: bash stops at an error, and then the job does, but for `cancelled()`.

    Args:
        folder: What the workspace is to a runner.
        only: Name of the one step.
        variables: In place of the workflow's own.
    """
    environment = {**environment_in(folder), **WORKFLOW["env"], **variables}
    executed: list[Step] = []
    for step in filter(is_executed, JOB["steps"]):
        has_failed = any(done.code for done in executed)
        if only not in (None, step["name"]) or (has_failed and "cancelled()" not in step.get("if", "")):
            continue
        assert "${{" not in step["run"]  # variables of the environment alone, which bash quotes
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        executed.append(Step(step["name"], done.returncode, done.stdout))
    return executed


def environment_in(folder: Path) -> dict[str, str]:
    """With `fastvlm-convert` in the search path, and the demo checkpoint where the workflow expects it."""
    tool = folder / "bin" / "fastvlm-convert"
    if not tool.exists():
        tool.parent.mkdir()
        tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fastvlm_convert "$@"\n')
        tool.chmod(0o755)
        (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    python = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    programs = (str(tool.parent), os.environ["PATH"])
    return {**os.environ, "PATH": os.pathsep.join(programs), "PYTHONPATH": os.pathsep.join(python)}


@pytest.mark.slow
class TestExecution:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory) -> Path:
        return tmp_path_factory.mktemp("workflow")

    @pytest.fixture(scope="class")
    def steps(self, folder) -> list[Step]:
        """Those of the first run on main."""
        return execute(folder)

    def test_every_step_passes_on_the_demo(self, steps):
        assert [(s.name, s.output) for s in steps if s.code] == []
        assert [s.name for s in steps] == [s["name"] for s in JOB["steps"] if is_executed(s)]

    def test_what_it_uploads_is_there(self, steps, folder):
        (upload,) = (s for s in JOB["steps"] if s.get("uses", "").startswith("actions/upload-artifact"))
        paths = [folder / line for line in upload["with"]["path"].split()]
        assert [path for path in paths if not path.exists()] == []
        for path in paths:
            if path.suffix == ".json":
                document = json.loads(path.read_text())
                assert (problems_of_document(document), document["status"]) == ([], "passed")

    def test_the_next_run_is_compared_with_the_accepted_bundle(self, steps, folder):
        (bench,) = execute(folder, only="Bench")
        text = (folder / "out" / "bench.json").read_text()
        assert "accepted" in text
        assert bench.code == {"passed": 0, "failed": 1}[json.loads(text)["status"]]  # it is a busy machine

    def test_a_gate_that_fails_ends_it_with_a_report(self, tmp_path):
        plain = load_recipe("fp16").to_dict()
        plain["gates"]["min_sqnr_db"] = 200
        (tmp_path / "strict.yaml").write_text(json.dumps(plain))  # JSON is YAML
        steps = execute(tmp_path, RECIPE="strict.yaml")
        assert [(s.name, s.code) for s in steps if s.code] == [("Verify", 1)]
        assert steps[-1].name == "Write the report"
        assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
