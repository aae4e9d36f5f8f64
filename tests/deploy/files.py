"""The files of deploy/, as tests read them."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from tests.commands import ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "Dockerfile"
MANIFESTS = sorted(path for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.stem != "kustomization")
PREFIX = "FAST_VLM_"


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction of a Dockerfile, and what follows it."""
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines.splitlines() if line)]


def image_environment() -> dict[str, str]:
    """The settings that the image has."""
    (given,) = (rest for word, rest in instructions(DOCKERFILE.read_text()) if word == "ENV")
    pairs = (pair.partition("=") for pair in shlex.split(given))
    return {name: value for name, _, value in pairs if name.startswith(PREFIX)}


def load(path: Path) -> dict[str, Any]:
    """A YAML file with one document."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def manifest(name: str) -> dict[str, Any]:
    """One of the Kubernetes manifests."""
    return load(DEPLOY / "kubernetes" / f"{name}.yaml")


def pod() -> dict[str, Any]:
    """What the Deployment's pods are."""
    return manifest("deployment")["spec"]["template"]["spec"]


def container() -> dict[str, Any]:
    """The one container of a pod."""
    (one,) = pod()["containers"]
    return one


def compose() -> dict[str, Any]:
    """The one service of the compose file."""
    (one,) = load(DEPLOY / "compose.yaml")["services"].values()
    return one


def settings_of(where: str) -> dict[str, str]:
    """The settings that a server gets: those of the image, changed by those of `compose` or `kubernetes`."""
    given = {
        "image": {},
        "compose": compose()["environment"],
        "kubernetes": {variable["name"]: variable["value"] for variable in container()["env"]},
    }[where]
    return {**image_environment(), **given}
