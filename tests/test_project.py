"""The files around the package agree with each other."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastvlm_convert

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = {
    canonicalize_name(name): version
    for name, _, version in (
        line.partition("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line
    )
}
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def test_what_is_pinned_is_what_is_required():
    extras = PROJECT["optional-dependencies"].values()
    wanted = [Requirement(r) for r in [*PROJECT["dependencies"], *(r for extra in extras for r in extra)]]
    for requirement in wanted:
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(PINNED[canonicalize_name(requirement.name)]), str(
                requirement
            )
    assert len(wanted) > 12


def test_commits_are_checked_with_the_ruff_that_is_pinned():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    revisions = {repository["repo"].rpartition("/")[2]: repository["rev"] for repository in config["repos"]}
    assert revisions == {"ruff-pre-commit": f"v{PINNED['ruff']}"}


def test_ci_runs_what_there_is():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    makefile = (ROOT / "Makefile").read_text()
    targets = {found for step in steps for found in re.findall(r"^make ([\w-]+)", step)}
    assert targets == {"lint", "demo", "clients", "clients-mlx", "test-all", "setup"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    scripts = {found for step in steps for found in re.findall(r"scripts/[\w.]+", step)}
    assert scripts == {"scripts/check_on_mac.py"}
    assert all((ROOT / script).is_file() for script in scripts)
    recipes = jobs["core-ml"]["strategy"]["matrix"]["recipe"]
    assert all((ROOT / "configs" / f"{recipe}.yaml").is_file() for recipe in recipes)


def test_a_bug_report_has_the_documents_of_the_tool():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    fields = {field["id"]: field["attributes"] for field in form["body"] if "id" in field}
    assert "--json" in fields["command"]["description"]
    assert "inspect CHECKPOINT --json" in fields["inspect"]["description"]


def test_the_changelog_begins_with_what_comes_next():
    first, *_ = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first == "Unreleased" or first.startswith(fastvlm_convert.__version__)
