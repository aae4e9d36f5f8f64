"""The manifest's schema as it is published in docs/schemas.

Run `make docs` (`python -m tests.published_schema`) to write it again after the manifest has changed.
"""

import json
from pathlib import Path

from fastvlm_convert.manifest_schema import manifest_schema

PATH = Path(__file__).parent.parent / "docs" / "schemas" / "manifest.schema.json"


def content() -> str:
    """The schema as the code has it."""
    return json.dumps(manifest_schema(), indent=2, ensure_ascii=False) + "\n"


def write() -> None:
    """Publish it."""
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(content(), encoding="utf-8")


if __name__ == "__main__":
    write()
