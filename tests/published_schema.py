"""The schemas that are published in docs/schemas: manifests, latency files, commands' `--json` documents.

Run `make docs` (`python -m tests.published_schema`) to write them again after the code has changed.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema
import typer

from fastvlm_convert.bench.imported.latency import latency_schema
from fastvlm_convert.cli.document import document_schema, documents
from fastvlm_convert.cli.main import app
from fastvlm_convert.manifest_schema import manifest_schema

FOLDER = Path(__file__).parent.parent / "docs" / "schemas"
PATH = FOLDER / "manifest.schema.json"


def published() -> dict[Path, str]:
    """The content of every file, as the code has it."""
    for command in typer.main.get_command(app).commands.values():  # imports it, and with it its documents
        tuple(getattr(command, "commands", {}).values())
    schemas = {name: document_schema(kind) for name, kind in documents().items()}
    return {FOLDER / f"{name}.schema.json": _text(s) for name, s in schemas.items()} | {
        PATH: _text(manifest_schema()),
        FOLDER / "latency.schema.json": _text(latency_schema()),
    }


def validator_of(document: dict[str, Any]) -> Any:
    """The validator for the schema that a command's `--json` document names, as that is published."""
    path = FOLDER / f"{document['schema'].removeprefix('fastvlm-convert/')}.schema.json"
    return jsonschema.Draft202012Validator(json.loads(path.read_text(encoding="utf-8")))


def problems_of_document(document: dict[str, Any]) -> list[str]:
    """What of a document contradicts it."""
    return [f"{e.json_path}: {e.message}" for e in validator_of(document).iter_errors(document)]


def write() -> None:
    """Publish them; the files of documents that there are no more are removed."""
    FOLDER.mkdir(exist_ok=True)
    files = published()
    for old in set(FOLDER.glob("*.schema.json")) - set(files):
        old.unlink()
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")


def _text(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write()
