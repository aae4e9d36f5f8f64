"""Measure contenders interleaved in one run: on a shared machine only ratios from one run can be trusted."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from fastvlm_convert.errors import WorkerError, error_class
from fastvlm_convert.progress import OnShare, ignore_share
from fastvlm_convert.targets import Target

METRICS: Final = ("vision_ms", "prefill_ms", "ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s")
_RATES: Final = ("prefill_tokens_per_s", "decode_tokens_per_s")  # larger is better
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


@dataclass(frozen=True)
class Spread:
    """Distribution of a metric over the trials.

    Attributes:
        p50: Median.
        p90: What 90 % of the trials were at least as good as.
        min: Least.
        max: Largest.
    """

    p50: float
    p90: float
    min: float
    max: float


@dataclass(frozen=True)
class ContenderResult:
    """What was measured of one contender.

    Attributes:
        name: Its name.
        executed_by: What executed it.
        load_ms: Time to load it, once.
        peak_memory_bytes: Most memory its process had resident.
        file_bytes: Size of its files.
        metrics: Distribution of every metric.
        ratio_to_reference: Per metric, its median over the reference's; empty without a reference.
    """

    name: str
    executed_by: str
    load_ms: float
    peak_memory_bytes: int
    file_bytes: int
    metrics: dict[str, Spread]
    ratio_to_reference: dict[str, float]


def bench(
    contenders: Sequence[Contender],
    *,
    image_size: int,
    context_length: int,
    new_tokens: int,
    trials: int,
    on_progress: OnShare = ignore_share,
) -> list[ContenderResult]:
    """Measure contenders round by round, each in its own process, all alive at once.

    Args:
        contenders: The first is the reference where it is a checkpoint.
        image_size: Edge of the input that a checkpoint is run with, in pixels.
        context_length: Tokens of a checkpoint's KV cache.
        new_tokens: Length of every answer.
        trials: Rounds that are measured, after one that is not.
        on_progress: Called with the share of the rounds done, 0..1.

    Raises:
        ConversionError: A contender cannot be loaded or run.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(c)) for c in contenders]
        loaded = [w.load(image_size, context_length) for w in workers]
        rounds: list[list[dict[str, Any]]] = [[] for _ in workers]
        for number in range(trials + 1):
            for worker, measured in zip(workers, rounds, strict=True):
                measured.append(worker.trial(new_tokens))
            on_progress((number + 1) / (trials + 1))
    results = [
        _result(contender, load, measured[1:])  # the first round warms up
        for contender, load, measured in zip(contenders, loaded, rounds, strict=True)
    ]
    if contenders[0].target is not None:
        return results
    reference = results[0].metrics
    return [_with_ratios(result, reference) for result in results]


class _Worker:
    """A contender's process."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        # A file, because a pipe that nobody reads fills up. Closed in __exit__.
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastvlm_convert.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def load(self, image_size: int, context_length: int) -> dict[str, Any]:
        contender = self._contender
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
                where=self._contender.path,
                hint="it may have run out of memory",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = error_class(answer["code"])
            raise kind(answer["error"], where=self._contender.name, hint=answer["hint"])
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


def _result(contender: Contender, load: dict[str, Any], measured: list[dict[str, Any]]) -> ContenderResult:
    return ContenderResult(
        name=contender.name,
        executed_by=load["executed_by"],
        load_ms=load["load_ms"],
        peak_memory_bytes=max(m["peak_memory_bytes"] for m in measured),
        file_bytes=contender.file_bytes,
        metrics={metric: _spread(metric, [m[metric] for m in measured]) for metric in METRICS},
        ratio_to_reference={},
    )


def _spread(metric: str, values: list[float]) -> Spread:
    p50, p90 = np.quantile(values, [0.5, 0.1 if metric in _RATES else 0.9])
    return Spread(float(p50), float(p90), min(values), max(values))


def _with_ratios(result: ContenderResult, reference: dict[str, Spread]) -> ContenderResult:
    ratios = {metric: spread.p50 / reference[metric].p50 for metric, spread in result.metrics.items()}
    return replace(result, ratio_to_reference=ratios)
