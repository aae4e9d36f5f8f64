"""The Dockerfile: what is checked without building it."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from tests.commands import ROOT
from tests.deploy.files import DEPLOY, DOCKERFILE, instructions

HADOLINT = Path(sys.executable).parent / "hadolint"
STEPS = instructions(DOCKERFILE.read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def last(word: str) -> str:
    return [rest for found, rest in STEPS if found == word][-1]


def hadolint(path: Path) -> list[dict[str, object]]:
    done = subprocess.run([HADOLINT, "--format", "json", path], capture_output=True, text=True)
    return json.loads(done.stdout)


def test_hadolint_finds_nothing():
    assert hadolint(DOCKERFILE) == []


def test_hadolint_would_find_something(tmp_path):
    careless = tmp_path / "Dockerfile"
    careless.write_text("FROM debian\nRUN cd /tmp && apt-get install python3\n")
    assert {"DL3006", "DL3008"} <= {finding["code"] for finding in hadolint(careless)}


def test_both_stages_have_the_same_pinned_base():
    assert re.fullmatch(r"BASE=[\w./-]+(:\d+\.\d+\.\d+[\w.-]*|@sha256:[0-9a-f]{64})", last("ARG"))
    assert [rest.split()[0] for word, rest in STEPS if word == "FROM"] == ["${BASE}", "${BASE}"]


def test_it_runs_as_a_user_by_number_that_is_not_root():
    """By number, so that `runAsNonRoot` of Kubernetes can see it."""
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last("USER"))
    assert [word for word, _ in STEPS].index("USER") > len(STEPS) - 8  # nothing is installed by that user


def test_its_health_check_asks_whether_it_lives():
    """Not whether it is ready: a server that drains must not be killed for it."""
    command = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    assert command[0] == "python"
    assert "127.0.0.1:8000/livez" in command[-1]
    compile(command[-1], "HEALTHCHECK", "exec")


def test_it_installs_what_is_pinned_and_no_torch():
    (install,) = (rest for word, rest in STEPS if word == "RUN" and "pip install" in rest)
    assert "--constraint constraints.txt" in install
    extras = re.search(r"'\.\[([\w,]+)\]'", install)[1].split(",")
    assert set(extras) == {"onnx", "serve"}
    optional = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in optional[extra])]
    assert not {"torch", "coremltools", "mlx"} & {Requirement(line).name for line in wanted}


def test_the_build_gets_what_it_needs():
    kept = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    needed = {"fastvlm_convert", "configs", "pyproject.toml", "constraints.txt", PROJECT["readme"]}
    assert needed | set(PROJECT["license-files"]) <= set(kept)
    assert all((ROOT / name).exists() for name in kept)


def test_the_build_gets_nothing_else():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    assert not any("checkpoints" in rule or ".git" in rule or "tests" in rule for rule in rules)


def test_nothing_of_it_holds_a_key():
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            assert not re.search(r"(?i)bearer |password|sk-\w{8}", path.read_text(encoding="utf-8")), path
