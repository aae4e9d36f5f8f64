"""Sixteen named rules for what looks like an attack: found, recorded, never altered.

The rules are in threats.yaml. Five are refusals that validation makes anyway, ten are patterns in texts, and
one counts refusals. A pattern says that a text looks odd and no more: people ask about pictures of code, and
nobody needs a pattern to ask a model for a wrong answer. So what is found is recorded, and refused only where
`threat_action` says `block`.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final, Literal

from fastvlm_convert.serve.errors import InvalidRequestError, RequestError
from fastvlm_convert.yaml_file import parse_yaml

Severity = Literal["low", "medium", "high"]

REPEATED_REJECTS: Final = "repeated_rejects"
# Sorting combining marks takes quadratic time, so a text is normalized in blocks.
_BLOCK: Final = 512
# Arabic ligatures whose compatibility forms are sentences of 18 and 8 characters.
_LONG_FORMS: Final = {0xFDFA: " ", 0xFDFB: " "}
_SPACES: Final = re.compile(r"\s+")


@dataclass(frozen=True)
class Rule:
    """What is looked for.

    Attributes:
        name: What incidents and metrics call it.
        description: For people.
        severity: How bad it is if somebody means it.
        codes: Codes of refusals that are incidents of this rule.
        patterns: Regular expressions over `plain(text)`, none of which repeats anything without bound.
        hostile: Texts, or addresses of pictures, that the rule finds.
        benign: Some that no rule finds.
    """

    name: str
    description: str
    severity: Severity
    codes: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]
    hostile: tuple[str, ...]
    benign: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """A rule that fits a request.

    Attributes:
        rule: Its name.
    """

    rule: str


@cache
def rules() -> tuple[Rule, ...]:
    """All rules, in the order of threats.yaml."""
    text = resources.files("fastvlm_convert.serve").joinpath("threats.yaml").read_text(encoding="utf-8")
    return tuple(
        Rule(
            name=given["name"],
            description=given["description"],
            severity=given["severity"],
            codes=tuple(given.get("codes", ())),
            patterns=tuple(re.compile(pattern) for pattern in given.get("patterns", ())),
            hostile=tuple(given.get("hostile", ())),
            benign=tuple(given.get("benign", ())),
        )
        for given in parse_yaml(text)
    )


def plain(text: str) -> str:
    """The copy of a text that patterns see: compatibility forms resolved, lower case, single spaces."""
    text = text.translate(_LONG_FORMS)
    blocks = (text[place : place + _BLOCK] for place in range(0, len(text), _BLOCK))
    resolved = "".join(unicodedata.normalize("NFKC", block) for block in blocks)
    return _SPACES.sub(" ", resolved).lower()


def scan(texts: Iterable[str]) -> list[Finding]:
    """Rules whose patterns are in texts, each once, in the order of the rules.

    Takes linear time. The texts stay as they are.
    """
    copies = [plain(text) for text in texts]
    return [
        Finding(rule.name)
        for rule in rules()
        if any(pattern.search(copy) for pattern in rule.patterns for copy in copies)
    ]


def finding_of(error: RequestError) -> Finding | None:
    """The rule that a refusal is an incident of, or None for ordinary mistakes."""
    return next((Finding(rule.name) for rule in rules() if error.code in rule.codes), None)


def blocked(findings: Sequence[Finding]) -> InvalidRequestError:
    """What a client is told where findings are refused."""
    names = ", ".join(finding.rule for finding in findings)
    return InvalidRequestError(
        f"the text looks like an attack ({names}), and this server refuses such texts; rephrase it",
        code="threat",
    )
