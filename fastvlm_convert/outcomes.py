"""What a command that checks found, in the forms that CI systems read."""

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Severity = Literal["error", "warning", "info"]

_COMMANDS: Final = {"error": "error", "warning": "warning", "info": "notice"}  # GitHub's names of severities


@dataclass(frozen=True)
class Outcome:
    """What one check came to.

    Attributes:
        id: The check's name, the same in every run.
        severity: What it means if it fails: only an `error` fails a build.
        status: Whether it passed, failed or could not be run.
        message: The figure, the reason of a failure, or why it was not run.
        where: What it is about: a file, a stage, a layer; None for the whole.
    """

    id: str
    severity: Severity
    status: Literal["passed", "failed", "not_run"]
    message: str
    where: str | None = None


def github(outcomes: Iterable[Outcome]) -> str:
    """Annotations of GitHub Actions, one a line: what failed, and what was not run.

    A step shows ten of each kind, so errors come first, then warnings; what passed is left out.
    """
    lines: dict[str, list[str]] = {"error": [], "warning": [], "notice": []}
    for outcome in outcomes:
        if outcome.status == "passed":
            continue
        command = _COMMANDS[outcome.severity]
        if outcome.status == "not_run" and command == "error":
            command = "warning"  # nothing is known to be wrong
        # The place stays in the text: `file=` is for files of the repository, which bundles are not.
        text = _data(_text(outcome))
        lines[command].append(f"::{command} title={_property(outcome.id)}::{text}\n")
    return "".join(line for of_kind in lines.values() for line in of_kind)


def junit(outcomes: Sequence[Outcome], suite: str) -> str:
    """A JUnit report of one suite.

    A failed check is a `failure` if its severity is `error`. The schema has no warnings: others pass, and
    what they found is in their `system-out`. What was not run is `skipped`.

    Args:
        outcomes: What was found.
        suite: Name of the suite, `lint` for example.
    """
    cases = [_case(outcome, suite) for outcome in outcomes]
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": "0",
        "skipped": str(sum(case.find("skipped") is not None for case in cases)),
    }
    root = ET.Element("testsuites", counts)
    ET.SubElement(root, "testsuite", {"name": suite, **counts}).extend(cases)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _case(outcome: Outcome, suite: str) -> ET.Element:
    name = outcome.id if outcome.where is None else f"{outcome.id} ({outcome.where})"
    case = ET.Element("testcase", {"classname": f"fastvlm-convert.{suite}", "name": _xml(name)})
    message = _xml(outcome.message)
    if outcome.status == "not_run":
        ET.SubElement(case, "skipped", {"message": message})
    elif outcome.status == "failed" and outcome.severity == "error":
        ET.SubElement(case, "failure", {"message": message, "type": _xml(outcome.id)}).text = message
    elif outcome.status == "failed":
        ET.SubElement(case, "system-out").text = f"{outcome.severity}: {message}"
    return case


def _text(outcome: Outcome) -> str:
    place = "" if outcome.where is None else f"{outcome.where}: "
    state = "not run: " if outcome.status == "not_run" else ""
    return f"{place}{state}{outcome.message}"


def _data(text: str) -> str:
    """The text of a workflow command, which ends with its line."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """The value of a workflow command's property, which also ends at a comma or a colon."""
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _xml(text: str) -> str:
    """Text with what XML 1.0 cannot hold, whatever is escaped, shown as Python does."""
    return "".join(char if _is_xml(ord(char)) else ascii(char)[1:-1] for char in text)


def _is_xml(code: int) -> bool:
    in_planes = 0x20 <= code <= 0xD7FF or 0xE000 <= code <= 0xFFFD or code >= 0x10000
    return in_planes or code in (0x9, 0xA, 0xD)
