"""What commands print with `--json`: frozen dataclasses, which their JSON schemas are derived from."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from fastvlm_convert.dataclass_io import schema_of
from fastvlm_convert.errors import ConversionError

Status = Literal["passed", "failed", "not_run", "error"]

EXIT_CODES: Final[Mapping[str, int]] = {"passed": 0, "failed": 1, "not_run": 2, "error": 2}
"""What a command that checks ends with, by the status of its document."""


@dataclass(frozen=True)
class Document:
    """What a command prints with `--json`, beside the head that all documents have.

    A command declares its own as a frozen dataclass:

        @dataclass(frozen=True)
        class SignDocument(Document, name="bundle-sign"):
            bundle: str
            signature: str

    That is all: `make docs` publishes its schema, and every document that a test reads is checked against it.

    Attributes:
        NAME: In `schema`, and of the file in docs/schemas.
        VERSION: Counts up when a key is renamed, removed or gets another meaning.
        STATUSES: What `status` may be.
    """

    NAME: ClassVar[str]
    VERSION: ClassVar[int]
    STATUSES: ClassVar[tuple[Status, ...]]

    def __init_subclass__(
        cls, *, name: str, version: int = 1, statuses: Sequence[Status] = ("passed",)
    ) -> None:
        super().__init_subclass__()
        cls.NAME, cls.VERSION, cls.STATUSES = name, version, tuple(statuses)

    def to_dict(self, command: str | None, status: str) -> dict[str, Any]:
        """The whole document as plain data.

        Args:
            command: The command that prints it; None where none was recognized.
            status: One of `STATUSES`.
        """
        head = {"schema": _schema_name(type(self)), "schema_version": self.VERSION}
        return {**head, "command": command, "status": status, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class ErrorFacts:
    """An error, for programs.

    Attributes:
        code: A word that stays the same between versions.
        message: For people.
        where: The file, folder or setting that it is about.
        hint: What to do next, for people.
    """

    code: str
    message: str
    where: str | None
    hint: str | None


@dataclass(frozen=True)
class ErrorDocument(Document, name="error", statuses=("error",)):
    """What every command prints where it could not run."""

    error: ErrorFacts


def documents() -> dict[str, type[Document]]:
    """Every kind of document, by its name; of the commands that have been imported."""
    return {kind.NAME: kind for kind in sorted(Document.__subclasses__(), key=lambda kind: kind.NAME)}


def document_schema(kind: type[Document]) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a command's document: every key is there, and no others are."""
    body = schema_of(kind, complete=True)
    command: dict[str, Any] = {"type": "string"}
    if kind is ErrorDocument:
        command = {"anyOf": [command, {"type": "null"}]}
        body["properties"]["error"]["properties"]["code"] = {"enum": _error_codes()}
    head = {
        "schema": {"enum": [_schema_name(kind)]},
        "schema_version": {"enum": [kind.VERSION]},
        "command": command,
        "status": {"enum": list(kind.STATUSES)},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{_schema_name(kind)}, version {kind.VERSION}",
        "description": (kind.__doc__ or "").partition("\n")[0],
        **body,
        "properties": {**head, **body["properties"]},
        "required": [*head, *body["required"]],
    }


def _schema_name(kind: type[Document]) -> str:
    return f"fastvlm-convert/{kind.NAME}"


def _error_codes() -> list[str]:
    """Of our errors, and the two that are no error class of ours."""
    ours = [kind.code for kind in ConversionError.__subclasses__()]
    return sorted({ConversionError.code, *ours, "interrupted", "internal"})
