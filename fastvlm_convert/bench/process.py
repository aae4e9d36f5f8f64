"""The process of one contender, as the run that starts it sees it."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from fastvlm_convert.bench.threads import Pinning
from fastvlm_convert.errors import WorkerError, error_class
from fastvlm_convert.targets import Target

QUESTION: Final = "Describe the image."


@dataclass(frozen=True)
class Contender:
    """Something to measure.

    Attributes:
        name: How the report calls it.
        path: A checkpoint or a bundle.
        target: Format of the bundle's artifacts, or None for a checkpoint.
        file_bytes: Size of its files.
    """

    name: str
    path: Path
    target: Target | None
    file_bytes: int


class WorkerProcess:
    """A contender's process, bound to the processors that the run uses.

    Args:
        contender: What it runs; None for the calibration loop.
        pinning: Its threads and processors.
    """

    def __init__(self, contender: Contender | None, pinning: Pinning) -> None:
        self._contender = contender
        self._name = "calibration" if contender is None else contender.name
        # A file, because a pipe that nobody reads fills up. Closed in __exit__.
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        with pinning.bound():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastvlm_convert.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env=pinning.environment(),
            )

    def load(self, image_size: int, context_length: int) -> dict[str, Any]:
        """Load it.

        Args:
            image_size: Edge of the input that a checkpoint is run with, in pixels.
            context_length: Tokens of a checkpoint's KV cache.

        Returns:
            `load_ms`, `executed_by`, `peak_memory_bytes`, and `energy_not_run` with the reason, or null.

        Raises:
            ConversionError: It cannot be loaded.
        """
        contender = self._contender
        if contender is None:
            return self._ask({"do": "load", "kind": "calibration"})
        return self._ask(
            {
                "do": "load",
                "kind": "checkpoint" if contender.target is None else "bundle",
                "path": str(contender.path),
                "target": contender.target,
                "image_size": image_size,
                "context_length": context_length,
            }
        )

    def trial(self, new_tokens: int) -> dict[str, Any]:
        """Answer once; figures by metric, and `peak_memory_bytes`.

        Raises:
            ConversionError: It cannot be run.
        """
        return self._ask({"do": "trial", "question": QUESTION, "new_tokens": new_tokens})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            raise WorkerError(
                f"the process that ran it ended: {self._last_words()}",
                where=None if self._contender is None else self._contender.path,
                hint="it may have run out of memory",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = error_class(answer["code"])
            raise kind(answer["error"], where=self._name, hint=answer["hint"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()  # its output has ended, so it has or soon will
        self._stderr.seek(0)
        lines = self._stderr.read().strip().splitlines()
        return lines[-1] if lines else f"exit code {code}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()
