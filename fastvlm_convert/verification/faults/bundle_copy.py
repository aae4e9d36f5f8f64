"""A copy of a bundle to plant faults in. It costs no space: files are linked until they are edited."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_convert.manifest import FILE_NAME, Manifest, file_entry
from fastvlm_convert.predict.export_plan import ExportPlan


@dataclass(frozen=True)
class Copy:
    """A copy of a bundle.

    Attributes:
        path: Its folder.
        original: The bundle's.
        manifest: What the bundle's manifest says, before any fault.
        plan: What an export of the bundle's checkpoint with its recipe would do.
        target: Where the fault is to be; `bundle` for none of the targets.
    """

    path: Path
    original: Path
    manifest: Manifest
    plan: ExportPlan
    target: str

    def owned(self, name: str) -> Path:
        """A file of the copy's own, which may be edited in place; named relative to the bundle."""
        path, source = self.path / name, self.original / name
        if path.samefile(source):
            path.unlink()
            shutil.copyfile(source, path)
        return path

    def edit_json(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Let `change` alter the content of a JSON file."""
        path = self.owned(name)
        value = json.loads(path.read_text(encoding="utf-8"))
        change(value)
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def rehash(self) -> None:
        """Make the manifest say what is in the files, so that integrity does not catch a fault first."""
        changed = [n for n in self.manifest.files if not (self.path / n).samefile(self.original / n)]
        entries = {name: dataclasses.asdict(file_entry(self.path / name)) for name in changed}
        if entries:
            self.edit_json(FILE_NAME, lambda manifest: manifest["files"].update(entries))


def linked_copy(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle whose files are links to the bundle's, or copies where a disk has no links.

    Args:
        bundle: The bundle.
        folder: An existing folder to put it into.
    """
    return Path(shutil.copytree(bundle, folder / "copy", copy_function=_link))


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, destination)
