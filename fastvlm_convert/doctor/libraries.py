"""Which libraries are here, in which versions, and whether they load."""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Final, Literal

from fastvlm_convert.errors import EXTRAS
from fastvlm_convert.lint.platform import Version, version_numbers

DISTRIBUTION: Final = "fastvlm-convert"
# Distribution -> what is imported, where that has another name.
_MODULES: Final = {
    "pillow": "PIL", "pyyaml": "yaml", "pyopenssl": "OpenSSL", "opentelemetry-sdk": "opentelemetry.sdk",
    "opentelemetry-instrumentation-fastapi": "opentelemetry.instrumentation.fastapi",
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry.exporter.otlp.proto.http",
}  # fmt: skip
_REQUIREMENT: Final = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?([^;]*)")
_EXTRA: Final = re.compile(r"extra == ['\"]([a-z]+)['\"]")
_BOUND: Final = re.compile(r"(>=|<)\s*(\d+(?:\.\d+)*)")
_LEFT_OUT: Final = frozenset({"all", "dev"})  # extras that are no capability
_TIMEOUT: Final = 120  # seconds; importing torch takes some on a cold disk


@dataclass(frozen=True)
class Library:
    """A library that this tool uses.

    Attributes:
        name: Its distribution.
        extra: The extra that installs it; None if it always comes along.
        required: Versions that the tool was made for: `>=1.22,<2`.
        installed: The version that is here; None if it is not.
        state: Whether it loads, or why not.
        problem: What is wrong, for people; None if nothing is.
    """

    name: str
    extra: str | None
    required: str
    installed: str | None
    state: Literal["ready", "missing", "broken", "untested"]
    problem: str | None


def libraries() -> tuple[Library, ...]:
    """Every library that the tool uses; each that is installed is imported, in a process of its own.

    More than a look for files: a library that was built for another numpy is installed and fails.
    """
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from its source
        requirements = []
    wanted = list(_wanted(requirements))
    here = {name: _version(name) for name, _, _ in wanted}
    failures = _failures([name for name, version in here.items() if version is not None])
    return tuple(
        _library(name, extra, bounds, here[name], failures.get(name)) for name, extra, bounds in wanted
    )


def _wanted(requirements: Iterable[str]) -> Iterator[tuple[str, str | None, str]]:
    """Name, extra and bounds of each library, once."""
    seen: set[str] = set()
    for requirement in requirements:
        match = _REQUIREMENT.match(requirement)
        extra = _EXTRA.search(requirement)
        group = None if extra is None else extra.group(1)
        if match is None or group in _LEFT_OUT:
            continue
        name = match.group(1).lower().replace("_", "-")
        if name not in seen and name != DISTRIBUTION:
            seen.add(name)
            bounds = sorted(_BOUND.findall(match.group(2)), reverse=True)
            yield name, group, ",".join(f"{sign}{version}" for sign, version in bounds)
    for module, extra_name in EXTRAS.items():  # of another installation than this source, an older one
        name = module.replace("_", "-")
        if not any(known.startswith(name) for known in seen):
            yield name, extra_name, ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _failures(names: Iterable[str]) -> dict[str, str]:
    """Why libraries do not load, by name; all are tried at the same time."""
    running = {}
    for name in names:
        module = _MODULES.get(name, name.replace("-", "_"))
        running[name] = subprocess.Popen(
            [sys.executable, "-c", f"import {module}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    found = {}
    for name, process in running.items():
        try:
            _, said = process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            found[name] = f"importing it takes more than {_TIMEOUT} seconds"
            continue
        if process.returncode:
            lines = said.strip().splitlines() or [f"the process ended with {process.returncode}"]
            found[name] = lines[-1]
    return found


def _library(
    name: str, extra: str | None, required: str, installed: str | None, failure: str | None
) -> Library:
    if installed is None:
        how = "pip install fastvlm-convert" if extra is None else f"pip install '.[{extra}]' in a clone"
        return Library(name, extra, required, None, "missing", f"not installed: {how}")
    if failure is not None:
        return Library(name, extra, required, installed, "broken", f"does not load: {failure}")
    if not _is_within(version_numbers(installed), required):
        problem = f"{installed} is untested; this tool was made for {required}"
        return Library(name, extra, required, installed, "untested", problem)
    return Library(name, extra, required, installed, "ready", None)


def _is_within(version: Version, required: str) -> bool:
    for sign, bound in _BOUND.findall(required):
        is_older = version < version_numbers(bound)
        if is_older != (sign == "<"):
            return False
    return True
