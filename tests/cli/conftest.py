"""The command line as a test calls it: through `main`, as a user does."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastvlm_convert.cli.main import main
from tests.checkpoints import GOLDEN, LLAVA, golden_cases
from tests.published_schema import problems_of_document

CHECKPOINT = GOLDEN / LLAVA / "checkpoint"
IMAGE = GOLDEN / LLAVA / "image0.png"


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on standard output."""
        value = json.loads(self.out)  # fails for nothing, for two, and for anything around it
        assert self.out.isascii()
        assert problems_of_document(value) == []
        return value


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command in this process."""

    def run(*argv: object) -> Result:
        before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
        capsys.readouterr()
        try:
            code = main([str(a) for a in argv])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def read_all(terminal: int) -> bytes:
    """Everything written to the other side of a pseudo-terminal, until it is closed."""
    content = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how Linux says that the other side has closed
            return content
        if not piece:
            return content
        content += piece


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with two golden pictures and their questions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    entries = []
    for case in [c for c in golden_cases() if c.name == LLAVA][:2]:
        shutil.copy(case.image, folder)
        entries.append({"image": case.image.name, "question": case.question})
    (folder / "questions.json").write_text(json.dumps(entries))
    return folder
