"""Models on Hugging Face by their id: `apple/FastVLM-0.5B`, or `apple/FastVLM-0.5B@REVISION`.

What is downloaded lies in `huggingface_hub`'s own cache, which other tools share; what lies there is used
without a network (where there is one, a branch's name is looked up first). Only files that a checkpoint needs
are fetched: no code.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from fastvlm_convert.errors import (
    CheckpointError,
    ConversionError,
    MissingDependencyError,
    printable,
    shortened,
)

_ID: Final = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.][\w./-]*))?")
_SETTINGS: Final = (
    "*.json", "merges.txt", "chat_template.jinja", "LICENSE*", "LICENCE*", "NOTICE*", "README.md",
)  # fmt: skip
_WEIGHTS: Final = ("*.safetensors", "*.bin")  # the second only where there are none of the first
_LOGIN: Final = "check the name; for a private model log in first: hf auth login"


@dataclass(frozen=True)
class HubModel:
    """A model that was found.

    Attributes:
        folder: Where its files lie in the cache.
        note: What was taken, and under which license.
    """

    folder: Path
    note: str


def is_model_id(text: str) -> bool:
    """Whether a text names a model on Hugging Face: it has the form of an id, and nothing local is meant."""
    return _ID.fullmatch(text) is not None and not Path(text).exists() and not Path(text).parent.is_dir()


def fetch_model(text: str) -> HubModel:
    """Find a model in the cache, or download it there.

    Args:
        text: An id, with or without a revision.

    Raises:
        CheckpointError: There is no such model or revision, it must not be read, or it is not in the cache
            and cannot be downloaded.
        MissingDependencyError: `huggingface_hub` is not installed.
    """
    match = _ID.fullmatch(text)
    assert match is not None, text
    name, revision = match["name"], match["revision"]
    folder = _download(name, revision, [*_SETTINGS, _WEIGHTS[0]])
    if not any(folder.glob(_WEIGHTS[0])):
        folder = _download(name, revision, [*_SETTINGS, *_WEIGHTS])
    return HubModel(folder, f"{name} at revision {folder.name[:12]}; license: {_license(folder)}")


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, f"the model id '{name}'") from error
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except (OSError, ValueError) as error:
        raise _error(error, name, revision) from error
    return Path(str(folder))


def _error(error: Exception, name: str, revision: str | None) -> ConversionError:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{name}"
    if isinstance(error, errors.GatedRepoError):
        what, hint = "asks to accept its license first", f"accept it at {page}, then: hf auth login"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what, hint = "is not on Hugging Face, nor is there such a folder", _LOGIN
    elif isinstance(error, errors.RevisionNotFoundError):
        what, hint = f"has no revision '{revision}'", f"revisions are listed at {page}/commits"
    elif isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        what = "is not in Hugging Face's cache, which is all that can be reached"
        hint = f"where there is a network: hf download {name} --local-dir FOLDER, and give the folder"
    else:
        reason = shortened(printable(str(error).strip().partition("\n")[0]), 120)
        what, hint = f"cannot be downloaded: {reason}", "try again; downloaded files are kept"
    return CheckpointError(f"model '{name}' {what}", hint=hint)


def _license(folder: Path) -> str:
    """The license that a model card states in its YAML head."""
    try:
        head = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[: 1 << 16].split("---")[1]
        card = yaml.safe_load(head)
    except (OSError, IndexError, ValueError, RecursionError, yaml.YAMLError):
        card = None
    card = card if isinstance(card, dict) else {}
    said = [card.get("license_name") or card.get("license"), card.get("license_link")]
    parts = [printable(shortened(str(part), 100)) for part in said if isinstance(part, str)]
    return ", ".join(parts) or "not stated"
